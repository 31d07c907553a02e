"""A model in the compressed-tensors layout, with a source's own values and scales, for vLLM and transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError
from converters.formats.compressed_layouts import (
    FLOAT,
    INT8_ACTIVATIONS,
    PACKED,
    PACKED_VALUES,
    PLAIN,
    SCALES,
    SHAPE,
    ZEROS,
    layout_shapes,
)
from converters.formats.compressed_tensors import quantization_config, weights_group
from converters.formats.packed_integers import pack
from converters.formats.safetensors import CODES, TensorSpec
from converters.model.config import ModelConfig
from converters.model.parameters import Parameter, parameters
from converters.sources.codes import SCALE, VALUES, ZERO_POINTS, Coding, PartsSource
from converters.sources.source import TensorSource

if TYPE_CHECKING:
    import torch

INT8_PACKED, INT8_ACTIVATED = INT8_LAYOUTS = ("packed", "activations")


@dataclass(frozen=True)
class CompressedExport:
    """What files in this layout hold of a ``source``; weights that it doesn't quantize are in ``config.dtype``.

    ``int8_layout`` is one of INT8_LAYOUTS: packed, for kernels that leave activations as they are, or as kernels take
    it that bring every token's activations to int8 too. None, where it wasn't said, is packed. Raises InputError where
    the source quantizes nothing, or a weight's format doesn't go with ``int8_layout``.
    """

    source: TensorSource
    config: ModelConfig
    int8_layout: str | None = None

    def __post_init__(self) -> None:
        if not self.codes:
            raise InputError(
                "--format compressed-tensors is for a --source of quantized shards, and nothing of this one is "
                "quantized. Quantize it first, with llama-quantize, or leave --format out."
            )
        int8 = {name: code for name, code in self.codes.items() if code.kind == "int8"}
        if self.int8_layout is not None and not int8:
            raise InputError(
                f"--int8-layout {self.int8_layout} is for int8 weights, and this source has none. Leave it out."
            )
        if self.int8_layout == INT8_ACTIVATED:
            for name, code in int8.items():
                if code.zero_points or code.group_size is not None:
                    raise InputError(
                        f"--int8-layout {INT8_ACTIVATED} is for int8 with one scale per output channel and no zero "
                        f"points, and {name} is in {code.name}. Leave it out, or quantize again with --int8 alone."
                    )

    @cached_property
    def codes(self) -> dict[str, Coding]:
        """How each weight is held that stays quantized."""
        return self.source.codings(self.config) if isinstance(self.source, PartsSource) else {}

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for parameter in parameters(self.config) for spec in self._specs(parameter))

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of config.json that describe these tensors."""
        names: dict[Coding, list[str]] = {}
        for name, code in self.codes.items():
            names.setdefault(code, []).append(name)
        groups = [(self._group(code), held) for code, held in names.items()]
        return {"quantization_config": quantization_config(self.config, groups)}

    @property
    def title(self) -> str:
        """What the weights are in, in words."""
        activated = f", int8 activations (--int8-layout {INT8_ACTIVATED})"
        codes = {code.name: self._group(code) for code in self.codes.values()}
        said = [f"{n} {g['format']}{activated if 'input_activations' in g else ''}" for n, g in codes.items()]
        return ", ".join(said)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of one of the ``specs``."""
        import torch

        weight, suffix = self._places.get(name, (name, None))
        if suffix is None:
            return self.source.rows(name, start, stop)
        code, give = self.codes[weight], self.source.part_rows
        if suffix == SHAPE:
            return torch.tensor(self._shapes[weight][start:stop], dtype=torch.int64)
        if suffix == ZEROS:  # packed along the outputs
            elements = 32 // code.bits
            last = min(stop * elements, self._shapes[weight][0])
            return pack(give(weight, ZERO_POINTS, start * elements, last), 0, code.bits)
        values = give(weight, SCALE if suffix == SCALES else VALUES, start, stop)
        return pack(values, bits=code.bits) if suffix == PACKED_VALUES else values

    def _specs(self, parameter: Parameter) -> list[TensorSpec]:
        name = parameter.name
        if name not in self.codes:
            return [TensorSpec(name, CODES[self.config.dtype], parameter.shape)]
        code = self.codes[name]
        dtypes = {PACKED_VALUES: "int32", SCALES: code.scales, ZEROS: "int32", SHAPE: "int64"}
        dtypes[""] = "float8_e4m3fn" if code.is_float else "int8"
        shapes = layout_shapes(self._group(code), parameter.shape)
        return [TensorSpec(name + suffix, CODES[dtypes[suffix]], shape) for suffix, shape in shapes.items()]

    def _group(self, code: Coding) -> dict[str, Any]:
        """``format``, ``weights`` and, where they are to be quantized, ``input_activations`` of a config group."""
        activated = (code.kind, self.int8_layout) == ("int8", INT8_ACTIVATED)
        layout = FLOAT if code.is_float else PLAIN if activated else PACKED
        group = weights_group(layout, "float" if code.is_float else "int", code.bits, code.group_size, code.zero_points)
        return group | ({"input_activations": dict(INT8_ACTIVATIONS)} if activated else {})

    @cached_property
    def _places(self) -> dict[str, tuple[str, str]]:
        """By the name of a tensor of a quantized weight: the weight, and what follows its name."""
        return {
            spec.name: (parameter.name, spec.name.removeprefix(parameter.name))
            for parameter in parameters(self.config)
            if parameter.name in self.codes
            for spec in self._specs(parameter)
        }

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {parameter.name: parameter.shape for parameter in parameters(self.config)}
