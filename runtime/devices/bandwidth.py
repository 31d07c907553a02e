"""Measuring the read bandwidth of the host's memory or a CUDA device's, which decoding is compared with."""

from __future__ import annotations

import statistics
import time

import torch

_BYTES = 512 << 20  # far larger than any cache
_REPEATS = 7


def measure_read_bandwidth(device: torch.device) -> float:
    """Bytes per second while summing a large float32 tensor, which reads it once; the median of several runs."""
    values = torch.ones(_BYTES // torch.float32.itemsize, device=device)
    seconds = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        values.sum().item()  # waits for CUDA
        seconds.append(time.perf_counter() - begin)
    return _BYTES / statistics.median(seconds[1:])
