"""The decoder on the host's CPU or CUDA device: the same shards put back together, eager or compiled by Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantize.scheme import StoredTensor
from quantize.shards import Shards
from runtime.capture import capture
from runtime.kv_cache import KVCache


class HostBackend:
    """One device holding whole tensors. ``mode`` is ``eager`` or ``inductor``."""

    chips = 1
    leader = True
    cache_type = KVCache

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.platform = f"{self._device.type}/{mode}"

    def load(self, shards: Shards, stored: StoredTensor) -> torch.Tensor:
        return shards.rows(stored.name, 0, stored.parameter.shape[0]).to(self._device)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, axis: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._device)

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self._mode == "eager" else capture(function, "inductor")

    def donate(self, tensors: Sequence[torch.Tensor]) -> None:
        """Nothing to do: the cache is updated in place."""

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def compilations(self) -> int:
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None
