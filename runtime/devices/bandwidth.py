"""How fast the host's memory, or a CUDA device's, is read: what decoding is held against."""

from __future__ import annotations

import statistics
import time

import torch

_BYTES = 512 << 20  # well over any cache
_REPEATS = 7


def measure_read_bandwidth(device: torch.device) -> float:
    """Bytes per second of summing a large float32 tensor, which reads it once: the median of a few."""
    values = torch.ones(_BYTES // torch.float32.itemsize, device=device)
    seconds = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        values.sum().item()  # on CUDA, waits
        seconds.append(time.perf_counter() - begin)
    return _BYTES / statistics.median(seconds[1:])
