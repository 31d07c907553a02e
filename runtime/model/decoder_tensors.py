"""Which tensors the decoder holds: those of the shards, the ones that take the same input put together.

Fewer, larger matrix products use the chip better than several small ones. Putting together is done on every chip by
itself, one part upon the other, so that a chip still needs nothing but its own file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from converters.formats.compressed_tensors import SCALE_SUFFIX
from converters.model.config import ModelConfig
from quantize.shards.stored import Scheme, StoredParameter, StoredTensor, stored_parameters

# Linears of one input, by the name of what they become together.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of the decoder: one of the shards, or several of them one upon the other, chip by chip."""

    name: str
    parts: tuple[StoredTensor, ...]

    @property
    def shard(self) -> int | None:
        """The axis along which it is split over the chips; None where every chip holds it whole."""
        return self.parts[0].parameter.row.shard

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a matrix product."""
        return self.parts[0].parameter.row.is_linear

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self._is_norm else getattr(torch, self.parts[0].dtype)

    def nbytes(self, config: ModelConfig, chips: int) -> int:
        """On each chip."""
        return sum(part.spec(config, chips).nbytes for part in self.parts)

    def local_shape(self, config: ModelConfig, chips: int) -> tuple[int, ...]:
        """Of each chip's part of it, as ``join`` gives it."""
        specs = [part.spec(config, chips) for part in self.parts]
        rows = sum(spec.shape[0] for spec in specs)
        return (rows,) if self._is_scale else (rows, *specs[0].shape[1:])

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One chip's part of it, from those of its parts.

        A scale, [out, 1] in the shards, becomes [out], and what a norm has float32, as they are used: on TPU a step
        would begin by making them so, one operation for each.
        """
        joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self._is_norm:
            return joined.float()
        return joined.flatten() if self._is_scale else joined

    @property
    def _is_norm(self) -> bool:
        return self.parts[0].parameter.row.is_norm

    @property
    def _is_scale(self) -> bool:
        return self.name.endswith(SCALE_SUFFIX)


def placed_tensors(config: ModelConfig, scheme: Scheme, chips: int, fuse_bytes: int | None) -> list[PlacedTensor]:
    """Every tensor that the decoder holds, in the order of the files.

    Weights are put together where that makes no more than ``fuse_bytes`` on each chip; None sets no limit.
    """
    stored = {each.weight.name: each for each in stored_parameters(config, scheme)}
    gone: set[str] = set()  # into another
    placed = []
    for name in stored:
        if name in gone:
            continue
        linear, _, kind = name.rpartition(".")
        whole, linears = _fusion(linear)
        weights = PlacedTensor(whole, tuple(stored[f"{part}.weight"].weight for part in linears))
        if fuse_bytes is not None and weights.nbytes(config, chips) > fuse_bytes:
            whole, linears = linear, [linear]  # with its bias
        names = [f"{part}.{kind}" for part in linears]
        placed += _put_together(f"{whole}.{kind}", [stored[part] for part in names])
        gone.update(names)
    return placed


def _fusion(linear: str) -> tuple[str, list[str]]:
    """The name of what begins with this linear, and of all that go into it; itself where it stays alone."""
    for whole, parts in FUSED.items():
        if linear.endswith("." + parts[0]):
            prefix = linear.removesuffix(parts[0])
            return prefix + whole, [prefix + part for part in parts]
    return linear, [linear]


def _put_together(name: str, parameters: Sequence[StoredParameter]) -> list[PlacedTensor]:
    """The weights (or biases) as one, and their scales where they are quantized."""
    tensors = [PlacedTensor(name, tuple(each.weight for each in parameters))]
    scales = tuple(each.scale for each in parameters if each.scale is not None)
    return [*tensors, PlacedTensor(name + SCALE_SUFFIX, scales)] if scales else tensors
