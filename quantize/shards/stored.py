"""What the shards hold of each parameter: which weights are in which format, as which tensors, split in which way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from converters.formats.compressed_tensors import quantization_config
from converters.formats.safetensors import CODES, TensorSpec
from converters.model.config import ModelConfig
from converters.model.parameters import Axis, Parameter, parameters
from quantize.formats.weight_format import Part, WeightFormat
from quantize.shards.partition import Split, axis_split, block_alignment
from quantize.shards.scheme import Scheme, check_groups

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the shards before its split: the ``part`` of a parameter's format."""

    parameter: Parameter
    part: Part
    ffn_group: int | None = None  # the group size of the weight in its layer whose inputs are the feed-forward axis

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
        return axis_split(config, axis, chips, block_alignment(config, axis, chips, self.ffn_group), inputs)

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
    ffn_group: int | None = None  # the group size of the weight in its layer whose inputs are the feed-forward axis

    @property
    def name(self) -> str:
        return self.parameter.name

    @cached_property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """In the order of the files."""
        return tuple(StoredTensor(self.parameter, part, self.ffn_group) for part in self.format.parts)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What its tensors, by their names, stand for."""
        return self.format.decode({each.part.suffix: tensors[each.name] for each in self.tensors})


def stored_parameters(config: ModelConfig, scheme: Scheme) -> list[StoredParameter]:
    """Every parameter in its stored form, in the order of the files. ``config.dtype`` is that of unquantized ones.

    Raises InputError where the scheme doesn't fit the model.
    """
    scheme.check(config)
    check_groups(config, scheme)
    formats = [(each, scheme.format_of(each, config)) for each in parameters(config)]
    # By layer: all of it that is split along the feed-forward axis must be split alike.
    down = [(each, form) for each, form in formats if each.row.shard == 1 and each.row.axes[1] is Axis.FFN]
    groups = {each.prefix: form.group_size for each, form in down}
    return [StoredParameter(each, form, groups.get(each.prefix)) for each, form in formats]


def quantization_fields(config: ModelConfig, scheme: Scheme) -> dict[str, Any]:
    """What config.json says beside the model's dimensions: its ``quantization_config`` where weights are quantized."""
    names: dict[WeightFormat, list[str]] = {each: [] for each in scheme.formats}
    for stored in stored_parameters(config, scheme):
        if stored.format.quantizes:
            names[stored.format].append(stored.name)
    groups = [(form.config_group, held) for form, held in names.items() if held]
    if not all(group for group, _ in groups):
        return {}
    return {"quantization_config": quantization_config(config, groups)} if groups else {}


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
