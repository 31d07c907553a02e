"""Which parameters the decoder holds: those of the shards, with linears that take the same input fused into one.

A few large matrix products use the chip better than several small ones, where their weights have the same format. Every
chip concatenates its own parts along their rows, so it still needs only its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from converters.model.config import ModelConfig
from converters.model.parameters import EMBEDDING, LM_HEAD, same_input, table
from quantize.formats.weight_format import WeightFormat
from quantize.shards.scheme import Scheme
from quantize.shards.stored import StoredParameter, StoredTensor, stored_parameters
from runtime.model.linears.linear import LinearWeight

# By name. Linears' weights are LinearWeights. Those that take the same input, and their biases, are a list under the
# name of the first: of the fused one, or of each.
DecoderParameters = Mapping[str, torch.Tensor | LinearWeight | list[Any]]


@dataclass(frozen=True)
class DecoderTensor:
    """A tensor of the decoder: one of the shards' tensors, or several concatenated along their rows on each chip."""

    name: str
    format: WeightFormat
    parts: tuple[StoredTensor, ...]

    @property
    def are_values(self) -> bool:
        """Whether it holds the values of a linear's weight, rather than their scales or the like."""
        return self.is_weight and self.parts[0].part == self.format.parts[0]

    @property
    def is_weight(self) -> bool:
        """Whether it is one of the tensors of a linear's weight."""
        return self.parts[0].parameter.row.is_linear

    @property
    def is_int4(self) -> bool:
        """Whether its elements are 4-bit integers, which are int8 on the host."""
        return self.parts[0].part.element == "int4"

    def groups(self, config: ModelConfig, chips: int) -> int | None:
        """Into how many groups the scales divide the inputs that a chip holds; None where they don't."""
        scale = next((part for part in self.format.parts if part.inputs not in (None, 1)), None)
        return None if scale is None else replace(self.parts[0], part=scale).local_shape(config, chips)[1]

    @property
    def shard(self) -> int | None:
        """The axis along which it is split over the chips; None where every chip holds all of it."""
        return self.parts[0].shard

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self._is_norm else self.parts[0].torch_dtype

    def nbytes(self, config: ModelConfig, chips: int) -> int:
        """Bytes on each chip."""
        return sum(part.spec(config, chips).nbytes for part in self.parts)

    def local_shape(self, config: ModelConfig, chips: int) -> tuple[int, ...]:
        """The shape of one chip's part, as ``join`` returns it."""
        shapes = [part.local_shape(config, chips) for part in self.parts]
        rows = sum(shape[0] for shape in shapes)
        return (rows,) if self._is_column else (rows, *shapes[0][1:])

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One chip's part of this tensor, from the same chip's tensors of ``parts`` in that order.

        A column [out, 1], as the shards store one scale per output channel, becomes [out], and a norm's tensors become
        float32, as they are used: otherwise every step on a TPU would start with one operation for each of them.
        """
        joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self._is_norm:
            return joined.float()
        return joined.flatten() if self._is_column else joined

    @property
    def _is_norm(self) -> bool:
        return self.parts[0].parameter.row.is_norm

    @property
    def _is_column(self) -> bool:
        return self.parts[0].part.inputs is None


@dataclass(frozen=True)
class DecoderParameter:
    """A parameter of the decoder: one of the shards' parameters, or several fused into one.

    ``group`` is the name of the first of those that take the same input, where there are several, fused or not.
    """

    name: str
    members: tuple[StoredParameter, ...]
    group: str | None = None

    @property
    def format(self) -> WeightFormat:
        return self.members[0].format

    @property
    def in_block(self) -> bool:
        """Whether every layer has one of its like."""
        return self.members[0].parameter.in_block

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a matrix product."""
        return self.members[0].parameter.row.is_linear

    @cached_property
    def tensors(self) -> dict[str, DecoderTensor]:
        """The tensors that its format consists of, by suffix."""
        by_part = zip(*(member.tensors for member in self.members), strict=True)
        tensors = [DecoderTensor(self.name + parts[0].part.suffix, self.format, tuple(parts)) for parts in by_part]
        return {tensor.parts[0].part.suffix: tensor for tensor in tensors}


def decoder_parameters(
    config: ModelConfig, scheme: Scheme, chips: int, fuse_bytes: int | None
) -> list[DecoderParameter]:
    """Every parameter that the decoder holds, in the order of the files.

    Weights are fused where they have the same format and the result has at most ``fuse_bytes`` of values on each chip;
    None sets no limit.
    """
    stored = {each.name: each for each in stored_parameters(config, scheme)}
    found = []
    for name, parameter in stored.items():
        linear, _, kind = name.rpartition(".")
        linears = of_same_input(linear, config)
        if len(linears) == 1:
            found.append(DecoderParameter(name, (parameter,)))
            continue
        first = f"{linears[0]}.{kind}"
        weights = [stored[f"{each}.weight"] for each in linears]  # biases go with them
        nbytes = sum(each.tensors[0].spec(config, chips).nbytes for each in weights)
        if len({each.format for each in weights}) > 1 or (fuse_bytes is not None and nbytes > fuse_bytes):
            found.append(DecoderParameter(name, (parameter,), first))
        elif name == first:
            members = tuple(stored[f"{each}.{kind}"] for each in linears)
            found.append(DecoderParameter(f"{_fused_name(linears)}.{kind}", members, first))
    return found


def head_parameters(config: ModelConfig, scheme: Scheme, chips: int, fuse_bytes: int | None) -> list[DecoderParameter]:
    """Those of ``decoder_parameters`` that follow the layers; the embedding too, where the output head shares it."""
    after = {*table(config.architecture, config.word_embed_proj_dim is not None).after}
    after.add(EMBEDDING if config.tie_word_embeddings else LM_HEAD)
    found = decoder_parameters(config.cut(1), scheme, chips, fuse_bytes)
    return [each for each in found if each.members[0].parameter.row in after and not each.in_block]


def decoder_tensors(parameters: Iterable[DecoderParameter]) -> list[DecoderTensor]:
    """All tensors of these parameters."""
    return [tensor for parameter in parameters for tensor in parameter.tensors.values()]


def collect(parameters: Iterable[DecoderParameter], load: Callable[[DecoderTensor], Any]) -> DecoderParameters:
    """The decoder's parameters by name, each tensor loaded onto the device by ``load``, one after the other."""
    held: dict[str, Any] = {}
    for parameter in parameters:
        tensors = {suffix: load(tensor) for suffix, tensor in parameter.tensors.items()}
        splits_inputs = next(iter(parameter.tensors.values())).shard == 1
        value = LinearWeight(parameter.format, tensors, splits_inputs) if parameter.is_linear else tensors[""]
        if parameter.group is None:
            held[parameter.name] = value
        else:
            held.setdefault(parameter.group, []).append(value)
    return held


def of_same_input(linear: str, config: ModelConfig) -> list[str]:
    """All linears that take the same input as this one, itself among them, in the order of the files."""
    for names in same_input(config.architecture):
        for name in names:
            if linear.endswith("." + name):
                prefix = linear.removesuffix(name)
                return [prefix + each for each in names]
    return [linear]


def _fused_name(linears: Sequence[str]) -> str:
    """``layers.0.self_attn.qkv_proj`` for q_proj, k_proj and v_proj, ``gate_up_proj`` for gate_proj and up_proj."""
    within = linears[0].rpartition(".")[0]
    stems = [linear.rpartition(".")[2].removesuffix("_proj") for linear in linears]
    between = "" if all(len(stem) == 1 for stem in stems) else "_"
    return f"{within}.{between.join(stems)}_proj"
