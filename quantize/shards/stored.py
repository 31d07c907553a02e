"""What the shards hold of each parameter: which weights are in which format, as which tensors, split in which way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError
from converters.console.notes import note
from converters.formats.compressed_tensors import quantization_config
from converters.formats.safetensors import CODES, TensorSpec
from converters.model.config import ModelConfig
from converters.model.parameters import LM_HEAD, Parameter, Row, parameters
from quantize.formats.floating import Floating
from quantize.formats.table import CHANNEL, FORMATS, GROUP_SIZES, KINDS, find_format
from quantize.formats.weight_format import Part, WeightFormat
from quantize.shards.partition import Split, axis_split, block_alignment

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
    def flags(self) -> str:
        """The options of llama-quantize that ask for it."""
        form = self.format
        said = form.group_size is not None or (form.kind in KINDS and KINDS[form.kind].in_groups)
        size = f" --group-size {form.group_size or CHANNEL}" if said else ""
        zero = " --zero-points" if form.zero_points else ""
        return f"--{form.kind}{size}{zero}" + (" --quantize-lm-head" if self.quantize_lm_head else "")

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
    group_size: int | None = None  # of the scheme's scales

    @property
    def name(self) -> str:
        return self.parameter.name + self.part.suffix

    @property
    def shape(self) -> tuple[int, ...]:
        """Before the split, in elements."""
        return self._shape(self.parameter.shape)

    @property
    def shard(self) -> int | None:
        """The axis along which it is split over the chips; None where every chip holds it whole."""
        shard = self.parameter.row.shard
        return None if shard == 1 and self.part.inputs is None else shard

    def split(self, config: ModelConfig, chips: int) -> Split:
        """What each chip holds along its shard axis, which it must have."""
        axis = self.parameter.row.axes[self.shard]
        inputs = self.part.inputs if self.shard == 1 else 1
        return axis_split(config, axis, chips, block_alignment(config, axis, chips, self.group_size), inputs)

    def local_shape(self, config: ModelConfig, chips: int) -> tuple[int, ...]:
        """Of the part that each chip holds, padding included, in elements."""
        shape = list(self.shape)
        if self.shard is not None:
            shape[self.shard] = self.split(config, chips).length
        return tuple(shape)

    def padding(self, config: ModelConfig, chips: int) -> int:
        """By how much the shard axis is longer over all chips than in the model: zeros, and what several chips hold."""
        return 0 if self.shard is None else self.split(config, chips).length * chips - self.shape[self.shard]

    def spec(self, config: ModelConfig, chips: int) -> TensorSpec:
        """Its entry in each chip's file."""
        return self._spec(self.local_shape(config, chips))

    @property
    def whole_spec(self) -> TensorSpec:
        """Its entry in the file of one chip that holds all of it."""
        return self._spec(self.shape)

    def fill_rows(self, count: int) -> torch.Tensor:
        """Rows of padding."""
        import torch

        return torch.full(self._shape((count, *self.parameter.shape[1:])), self.part.fill, dtype=self.torch_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of its elements."""
        import torch

        return getattr(torch, self.part.dtype)

    def _spec(self, shape: tuple[int, ...]) -> TensorSpec:
        return TensorSpec(self.name, CODES[self.part.file_dtype], self.part.file_shape(shape))

    def _shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape) if self.part.inputs == 1 else (shape[0], self.part.width(shape[1]))


@dataclass(frozen=True)
class StoredParameter:
    """How the shards hold one parameter of the model."""

    parameter: Parameter
    format: WeightFormat
    group_size: int | None = None  # of the scheme's scales

    @property
    def name(self) -> str:
        return self.parameter.name

    @cached_property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """In the order of the files."""
        return tuple(StoredTensor(self.parameter, part, self.group_size) for part in self.format.parts)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What its tensors, by their names, stand for."""
        return self.format.decode({each.part.suffix: tensors[each.name] for each in self.tensors})


def default_scheme(kind: str, config: ModelConfig, quantize_lm_head: bool = False, zero_points: bool = False) -> Scheme:
    """The scheme of a kind of format where no group size is given.

    A kind in groups takes the largest of GROUP_SIZES that divides the inputs of all weights to quantize, and says so
    where it isn't the first; where none does, a scale per output channel. Raises InputError as ``find_format`` does.
    """
    sizes: Sequence[int | None] = (*GROUP_SIZES, None) if KINDS[kind].in_groups else (None,)
    for size in sizes:
        scheme = Scheme(find_format(kind, size, zero_points).name, quantize_lm_head)
        misfits = [] if size is None else _misfits(config, scheme, size)
        if not misfits:
            break
        last = misfits[0]
    if size != sizes[0]:
        chosen = "one scale per output channel is" if size is None else f"groups of {size} are"
        note(f"{last.name} has {last.shape[-1]} inputs, no multiple of {sizes[sizes.index(size) - 1]}: {chosen} taken.")
    return scheme


def _misfits(config: ModelConfig, scheme: Scheme, size: int) -> list[Parameter]:
    """The weights to quantize whose inputs are no multiple of ``size``."""
    return [
        each
        for each in parameters(config.cut(1))
        if scheme.format_of(each.row, config).quantizes and each.shape[-1] % size
    ]


def stored_parameters(config: ModelConfig, scheme: Scheme) -> list[StoredParameter]:
    """Every parameter in its stored form, in the order of the files. ``config.dtype`` is that of unquantized ones.

    Raises InputError where the scheme doesn't fit the model.
    """
    scheme.check(config)
    size = scheme.format.group_size
    if size is not None and (misfits := _misfits(config, scheme, size)):
        sizes = [each for each in GROUP_SIZES if not _misfits(config, scheme, each)]
        raise InputError(
            f"{misfits[0].name} has {misfits[0].shape[-1]} inputs, which is no multiple of {size}. Give --group-size "
            f"{' or '.join(map(str, [*sizes, CHANNEL]))}."
        )
    return [StoredParameter(each, scheme.format_of(each.row, config), size) for each in parameters(config)]


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
    tensors = stored_tensors(config, scheme)
    return sum(
        tensor.spec(config, chips).nbytes * chips - tensor.whole_spec.nbytes
        for tensor in tensors
        if tensor.shard is not None
    )
