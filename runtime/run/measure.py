"""What is measured after a generation: memory, bandwidth, and the error from the cache's dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from converters.console.progress import spinner
from runtime.run.generate import Generator
from runtime.run.later import Measurements
from runtime.run.load import make_cache, make_decoder
from runtime.run.metrics import LogitError, Measured, host_peak_rss_bytes
from runtime.run.session import Session


@torch.no_grad()
def measure(session: Session, prompt: list[int]) -> Measured:
    """Measure memory peaks first, since the rest may raise them. The session should have released its decoder, because
    this needs memory. A measurement that fails is noted in ``Measured.failures``.
    """
    later, options = Measurements(), session.options
    device_peak = later.attempt(Measured.DEVICE_PEAK, session.backend.peak_bytes)
    host_peak = later.attempt(Measured.HOST_PEAK, host_peak_rss_bytes)
    bandwidth = later.attempt(Measured.BANDWIDTH, session.backend.read_bandwidth)
    error = None
    if options.cache_dtype not in (options.dtype, torch.float32):
        error = later.attempt(Measured.CACHE_ERROR, lambda: _cache_error(session, prompt))
    return Measured(device_peak, host_peak, bandwidth, error, later.failures, later.interrupted)


def _cache_error(session: Session, prompt: list[int]) -> LogitError:
    """The error from the cache's dtype: logits [1, V] through this cache compared with those through a float32 one.

    Both are computed in float32 with the same weights, so only the cache differs: in bfloat16, the difference would
    also contain the rounding of activations, which is larger than the error to be measured. Compiles its own graphs.
    """
    config, backend, options = session.config, session.backend, session.options
    decoder = make_decoder(config, torch.float32, backend, session.tensors)

    def logits(dtype: torch.dtype) -> Tensor:
        cache = make_cache(config, backend, 1, options.max_seq_len, dtype)
        return Generator(config, decoder, cache, backend, options.buckets).logits([prompt])

    with spinner("Measuring the cache's error: compiling in float32"):
        exact = logits(torch.float32)
        error = logits(options.cache_dtype) - exact
    found = LogitError(error.abs().max().item(), (error.norm() / exact.norm()).item())
    if not math.isfinite(found.max_abs + found.relative):
        raise ArithmeticError("the logits are not all finite")
    return found
