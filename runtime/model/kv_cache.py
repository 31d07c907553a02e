"""Keys and values of past tokens in tensors of fixed shape: tokens are written by index, so no shape ever changes.

A layer's keys are [B, H, S, D]: rows, KV heads of all chips, slots, head dimension; its values likewise. In int8, every
token's key and value in every head has its own float32 scale, [B, H, S, 1]: a token with large values costs the others
no precision, and a token is quantized once, when it is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

HEAD_AXIS = 1
SLOT_AXIS = 2
_QMAX = 127
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny

Layers = list[list[torch.Tensor]]  # for each layer: keys, values, and for int8 the scales of both


class KVCache:
    """The keys and values of every layer, updated in place, for eager execution and Inductor."""

    def __init__(self, layers: Sequence[Sequence[torch.Tensor]]) -> None:
        """Each layer holds keys and values, or int8 keys, int8 values, the keys' scales and the values' scales."""
        self.layers: Layers = [list(layer) for layer in layers]

    @staticmethod
    def stored_as(dtype: torch.dtype) -> torch.dtype:
        """The dtype of tensors that hold keys and values of ``dtype``."""
        return dtype

    @property
    def batch_size(self) -> int:
        return self.layers[0][0].shape[0]

    @property
    def slots(self) -> int:
        return self.layers[0][0].shape[SLOT_AXIS]

    def update(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """Write ``keys`` and ``values`` [B, H, T, D] at consecutive ``slots`` [T]; returns the layer's tensors."""
        whole = self.layers[layer]
        parts = [keys, values]
        if whole[0].dtype == torch.int8:
            quantized = [quantize_tokens(keys), quantize_tokens(values)]
            parts = [*(part for part, _ in quantized), *(scale for _, scale in quantized)]
        written = zip(whole, parts, strict=True)
        self.layers[layer] = [self._write(old, slots, part) for old, part in written]
        return [self._read(tensor) for tensor in self.layers[layer]]

    def _write(self, whole: torch.Tensor, slots: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return whole.index_copy_(SLOT_AXIS, slots, part.to(whole.dtype))

    def _read(self, whole: torch.Tensor) -> torch.Tensor:
        return whole


class FunctionalKVCache(KVCache):
    """A cache whose updates are new tensors, which a graph returns: XLA writes them over donated inputs."""

    def _write(self, whole: torch.Tensor, slots: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return whole.index_copy(SLOT_AXIS, slots, part.to(whole.dtype))


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values [..., D] and float32 scales [..., 1] for x [..., D], such that x is about values * scale."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / _QMAX).clamp(min=_SMALLEST_SCALE)
    return (x / scale).round().to(torch.int8), scale
