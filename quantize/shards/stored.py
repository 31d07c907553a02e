"""What the shards hold of each parameter: which weights are in which format, as which tensors, split in which way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError
from converters.formats.compressed_tensors import quantization_config
from converters.formats.safetensors import CODES, ITEM_BYTES, TensorSpec
from converters.model.config import ModelConfig
from converters.model.parameters import LM_HEAD, Axis, Parameter, Row, parameters
from quantize.formats.floating import Floating
from quantize.formats.table import FORMATS
from quantize.formats.weight_format import Part, WeightFormat
from quantize.shards.partition import Split, axis_split

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scheme:
    """Which weights are in which format: the blocks' linears (and lm_head on demand) in ``name``, by the table.

    Everything else is in the model's own dtype, or in that of ``name`` where it is a floating format.
    """

    name: str
    quantize_lm_head: bool = False

    @property
    def format(self) -> WeightFormat:
        return FORMATS[self.name]

    @property
    def alignment(self) -> int:
        """The inputs that must stay on one chip: each chip's part of a feed-forward layer is a multiple of this."""
        return lcm(*(1 if part.is_shared else part.inputs or 1 for part in self.format.parts))

    def floating_dtype(self, config: ModelConfig) -> str:
        """The dtype of what is not quantized."""
        return config.dtype if self.format.quantizes else self.format.parts[0].dtype

    def format_of(self, row: Row, config: ModelConfig) -> WeightFormat:
        """The format of one kind of parameter."""
        if not self.format.quantizes or row.quantized or (self.quantize_lm_head and row is LM_HEAD):
            return self.format
        return Floating(config.dtype)

    def check(self, config: ModelConfig) -> None:
        """Raise InputError where the scheme doesn't fit the model."""
        if self.quantize_lm_head and (not self.format.quantizes or config.tie_word_embeddings):
            why = (
                "it has no lm_head of its own (tied embeddings)"
                if self.format.quantizes
                else f"--{self.name} quantizes nothing"
            )
            raise InputError(f"--quantize-lm-head can't be applied to {config.name}: {why}. Leave it out.")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the shards before its split: the ``part`` of a parameter's format."""

    parameter: Parameter
    part: Part
    alignment: int = 1

    @property
    def name(self) -> str:
        return self.parameter.name + self.part.suffix

    @property
    def dtype(self) -> str:
        return self.part.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Before the split."""
        return self._shape(self.parameter.shape)

    @property
    def shard(self) -> int | None:
        """The axis along which it is split over the chips; None where every chip holds it whole."""
        shard = self.parameter.row.shard
        return None if shard == 1 and self.part.inputs is None else shard

    def split(self, config: ModelConfig, chips: int) -> Split:
        """What each chip holds along its shard axis, which it must have."""
        axis = self.parameter.row.axes[self.shard]
        alignment = 1 if axis is Axis.VOCAB else self.alignment
        found = axis_split(config, axis, chips, alignment, self.part.inputs if self.shard == 1 else 1)
        if found.repeat > 1 and not self.part.is_shared:
            raise InputError(
                f"{self.name} can't be split over {chips} chips: {self.part.inputs} inputs are stored as one element, "
                "and chips would begin or end within them. Give another number of chips, or another format."
            )
        return found

    def local_shape(self, config: ModelConfig, chips: int) -> tuple[int, ...]:
        """Of the part that each chip holds, padding included."""
        shape = list(self.shape)
        if self.shard is not None:
            shape[self.shard] = self.split(config, chips).length
        return tuple(shape)

    def padding(self, config: ModelConfig, chips: int) -> int:
        """By how much the shard axis is longer over all chips than in the model: zeros, and what several chips hold."""
        return 0 if self.shard is None else self.split(config, chips).length * chips - self.shape[self.shard]

    def spec(self, config: ModelConfig, chips: int) -> TensorSpec:
        """Its entry in each chip's file."""
        return TensorSpec(self.name, CODES[self.dtype], self.local_shape(config, chips))

    def fill_rows(self, count: int) -> torch.Tensor:
        """Rows of padding."""
        import torch

        return torch.full(self._shape((count, *self.parameter.shape[1:])), self.part.fill, dtype=self.torch_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    def _shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape) if self.part.inputs == 1 else (shape[0], self.part.width(shape[1]))


@dataclass(frozen=True)
class StoredParameter:
    """How the shards hold one parameter of the model."""

    parameter: Parameter
    format: WeightFormat
    alignment: int = 1

    @property
    def name(self) -> str:
        return self.parameter.name

    @cached_property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """In the order of the files."""
        return tuple(StoredTensor(self.parameter, part, self.alignment) for part in self.format.parts)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What its tensors, by their names, stand for."""
        return self.format.decode({each.part.suffix: tensors[each.name] for each in self.tensors})

    def check(self) -> None:
        """Raise InputError where the weight's inputs are not what the format can hold."""
        for part in self.format.parts:
            if part.inputs is not None and self.parameter.shape[-1] % part.inputs:
                raise InputError(
                    f"{self.name} has {self.parameter.shape[-1]} inputs, which is no multiple of {part.inputs}, as "
                    f"{self.format.name} needs it. Give another format."
                )


def stored_parameters(config: ModelConfig, scheme: Scheme) -> list[StoredParameter]:
    """Every parameter in its stored form, in the order of the files. ``config.dtype`` is that of unquantized ones.

    Raises InputError where the scheme doesn't fit the model.
    """
    scheme.check(config)
    alignment = scheme.alignment
    stored = [StoredParameter(each, scheme.format_of(each.row, config), alignment) for each in parameters(config)]
    for each in stored:
        each.check()
    return stored


def quantization_fields(config: ModelConfig, scheme: Scheme) -> dict[str, Any]:
    """What config.json says beside the model's dimensions: its ``quantization_config`` where weights are quantized."""
    group = scheme.format.config_group
    if group is None:
        return {}
    quantized = {stored.name for stored in stored_parameters(config, scheme) if stored.format.quantizes}
    return {"quantization_config": quantization_config(config, quantized, group)}


def stored_tensors(config: ModelConfig, scheme: Scheme) -> list[StoredTensor]:
    """Every tensor that the shards hold, in the order of the files."""
    return [tensor for stored in stored_parameters(config, scheme) for tensor in stored.tensors]


def chip_specs(config: ModelConfig, scheme: Scheme, chips: int) -> list[TensorSpec]:
    """The entries of each chip's file: the same for every chip."""
    return [tensor.spec(config, chips) for tensor in stored_tensors(config, scheme)]


def padding_bytes(config: ModelConfig, scheme: Scheme, chips: int) -> int:
    """What splitting adds over all chips: heads of zeros, repeated KV heads, blocks rounded up to equal ones."""
    total = 0
    for tensor in stored_tensors(config, scheme):
        extra = tensor.padding(config, chips)
        if extra:
            total += extra * prod(tensor.shape) // tensor.shape[tensor.shard] * ITEM_BYTES[CODES[tensor.dtype]]
    return total
