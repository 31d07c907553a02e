"""Keys and values of past tokens, of fixed shape: a token's place is written by index, so no shape ever changes.

A layer's keys are [B, H, S, D]: rows, KV heads of all chips, slots, head dimension; its values likewise.
"""

from __future__ import annotations

import torch

from converters.config import ModelConfig
from quantize.partition import plan_heads

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


def cache_shape(config: ModelConfig, chips: int, batch_size: int, max_seq_len: int) -> tuple[int, int, int, int]:
    """[B, H, S, D] of one layer's keys (and of its values) over all chips, repeated and zero heads included."""
    heads = plan_heads(config.num_heads, config.num_kv_heads, chips)
    return batch_size, heads.kv_slots, max_seq_len, config.head_dim


def cache_bytes_per_chip(config: ModelConfig, chips: int, batch_size: int, max_seq_len: int, item_bytes: int) -> int:
    """Bytes of keys and values that each chip holds: 2 * layers * B * (H / chips) * S * D * item_bytes."""
    batch, heads, slots, head_dim = cache_shape(config, chips, batch_size, max_seq_len)
    return 2 * config.num_layers * batch * (heads // chips) * slots * head_dim * item_bytes
