"""Keys and values of past tokens, of fixed shape: a token's place is written by index, so no shape ever changes.

A layer's keys are [B, H, S, D]: rows, KV heads of all chips, slots, head dimension; its values likewise.
"""

from __future__ import annotations

import torch

HEAD_AXIS = 1
SLOT_AXIS = 2


class KVCache:
    """The keys and values of every layer, updated in place: what eager execution and Inductor want."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.keys, self.values = list(keys), list(values)

    @property
    def slots(self) -> int:
        return self.keys[0].shape[SLOT_AXIS]

    def update(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``keys`` and ``values`` [B, H, T, D] at ``slots`` [T]; returns the layer's whole keys and values."""
        self.keys[layer].index_copy_(SLOT_AXIS, slots, keys)
        self.values[layer].index_copy_(SLOT_AXIS, slots, values)
        return self.keys[layer], self.values[layer]


class FunctionalKVCache(KVCache):
    """A cache whose updates are new tensors, to be returned from a graph: XLA writes them over donated inputs."""

    def update(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[layer] = self.keys[layer].index_copy(SLOT_AXIS, slots, keys)
        self.values[layer] = self.values[layer].index_copy(SLOT_AXIS, slots, values)
        return self.keys[layer], self.values[layer]
