"""The figures of a run, in the post's terms: latency T, per-token latency T / L, throughput B * L / T.

T is the time of the L decode steps; prefill, loading and compiling are reported separately.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from converters.console.units import format_bytes, format_count, plural
from converters.model.config import ModelConfig
from runtime.devices.backend import CacheUse
from runtime.model.sizing import parameter_count, post_cache_bytes, post_parameter_bytes, post_parameters
from runtime.run.generate import Generation


@dataclass(frozen=True)
class Sizes:
    """Bytes that follow from the model, the cache and the chips: per chip, except those of a step."""

    parameter_bytes_per_chip: int
    padding_bytes_per_chip: int  # the part of the parameters that splitting over these chips adds
    kv_cache_bytes_per_chip: int
    kv_cache_dtype: str
    step_bytes: int  # weights and cache that a decode step must read, on all chips together


@dataclass(frozen=True)
class Formulas:
    """The whole model's parameters, and sizes by the post's formulas (runtime/model/sizing.py)."""

    parameters: int
    post_parameters: int
    post_parameter_bytes: int
    post_cache_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, batch_size: int, max_seq_len: int) -> Formulas:
        return cls(
            parameter_count(config),
            post_parameters(config),
            post_parameter_bytes(config),
            post_cache_bytes(config, batch_size, max_seq_len),
        )


@dataclass(frozen=True)
class LogitError:
    """The difference of logits through a cache of some dtype and through a float32 one; all else is float32."""

    max_abs: float
    relative: float  # the norm of the difference over the norm of the logits through the float32 cache


@dataclass(frozen=True)
class Measured:
    """What is measured after the generation. None where it doesn't apply or failed; ``failures`` says why, by name."""

    DEVICE_PEAK: ClassVar = "device peak"
    HOST_PEAK: ClassVar = "host peak RSS"
    BANDWIDTH: ClassVar = "bandwidth utilisation"
    CACHE_ERROR: ClassVar = "logit error of the cache"

    device_peak_bytes: int | None  # None also where the device doesn't report it
    host_peak_rss_bytes: int | None
    read_bytes_per_s: float | None  # of the memory of all chips together
    cache_logit_error: LogitError | None  # None also for a cache of the activations' dtype, or of float32
    failures: dict[str, str]
    interrupted: bool  # by the user


@dataclass(frozen=True)
class Run:
    """Everything that is reported about one run."""

    model: str
    platform: str
    chips: int
    batch_size: int
    prompt_tokens: int  # of the longest row
    load_s: float
    compile_s: float
    recompilations: int
    sizes: Sizes
    measured: Measured
    formulas: Formulas
    compile_cache: CacheUse | None  # None without --compile-cache
    generation: Generation
    end_tokens: str | None  # None where config.json has them all
    text: list[str] | None

    @property
    def step_s(self) -> float:
        """The per-token latency T / L, in seconds."""
        return self.generation.decode_s / self.generation.steps

    @property
    def utilisation(self) -> float | None:
        """Model bandwidth utilisation: the share of the measured bandwidth that the steps use."""
        bandwidth = self.measured.read_bytes_per_s
        return None if bandwidth is None else self.sizes.step_bytes / self.step_s / bandwidth

    def to_json(self) -> dict[str, Any]:
        """The run under the keys that scripts rely on; times in the units that the keys name."""
        generation, sizes, measured = self.generation, self.sizes, self.measured
        return {
            "model": self.model,
            "platform": self.platform,
            "chips": self.chips,
            "batch_size": self.batch_size,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": generation.steps,
            "latency_s": generation.decode_s,
            "per_token_latency_ms": 1000 * self.step_s,
            "throughput_tokens_per_s": self.batch_size / self.step_s,
            "prefill_ms": 1000 * generation.prefill_s,
            "prefill_executions": generation.prefill_executions,
            "first_token_ms": 1000 * generation.first_token_s,
            "load_s": self.load_s,
            "compile_s": self.compile_s,
            "compile_cache": self.compile_cache and self.compile_cache._asdict(),
            "recompilations": self.recompilations,
            "bandwidth": {
                "step_bytes": sizes.step_bytes,
                "read_bytes_per_s": measured.read_bytes_per_s,
                "utilisation": self.utilisation,
            },
            "memory": {
                "parameter_bytes_per_chip": sizes.parameter_bytes_per_chip,
                "kv_cache_bytes_per_chip": sizes.kv_cache_bytes_per_chip,
                "kv_cache_dtype": sizes.kv_cache_dtype,
                "device_peak_bytes": measured.device_peak_bytes,
                "host_peak_rss_bytes": measured.host_peak_rss_bytes,
            },
            "kv_cache_logit_error": measured.cache_logit_error and asdict(measured.cache_logit_error),
            "formulas": asdict(self.formulas),
            "token_ids": generation.token_ids,
            "text": self.text,
        }

    def table(self) -> str:
        """The figures as lines of text."""
        generation, sizes, measured = self.generation, self.sizes, self.measured
        rows = [
            ("model", self.model),
            ("platform", f"{self.platform}, {plural(self.chips, 'chip')}"),
            ("batch size (B)", self.batch_size),
            ("prompt tokens", self.prompt_tokens),
            ("new tokens (L)", generation.steps),
            ("latency (T)", f"{generation.decode_s:.3f} s"),
            ("per-token latency (T/L)", f"{1000 * self.step_s:.2f} ms"),
            ("throughput (B*L/T)", f"{self.batch_size / self.step_s:.2f} tokens/s"),
            (Measured.BANDWIDTH, self._utilisation()),
            ("prefill", f"{1000 * generation.prefill_s:.1f} ms, {plural(generation.prefill_executions, 'execution')}"),
            ("first token after", f"{1000 * generation.first_token_s:.1f} ms"),
            ("load", f"{self.load_s:.2f} s"),
            ("compile (warm-up)", f"{self.compile_s:.2f} s"),
            *self._cache_rows(),
            ("recompilations", self.recompilations),
            ("parameters per chip", _parameters(sizes)),
            ("KV cache per chip", f"{format_bytes(sizes.kv_cache_bytes_per_chip)}, {sizes.kv_cache_dtype}"),
            ("end tokens", self.end_tokens),
            (Measured.DEVICE_PEAK, _bytes(measured.device_peak_bytes)),
            (Measured.HOST_PEAK, _bytes(measured.host_peak_rss_bytes)),
            *self._formula_rows(),
            (Measured.CACHE_ERROR, self._cache_error()),
        ]
        failed = {name: f"not measured ({why})" for name, why in measured.failures.items()}
        shown = [(label, failed.get(label, value)) for label, value in rows]
        width = max(len(label) for label, value in shown if value is not None)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in shown if value is not None)

    def _utilisation(self) -> str | None:
        if self.utilisation is None:
            return None
        return (
            f"{100 * self.utilisation:.0f}%: {format_bytes(self.sizes.step_bytes)} a step, memory read at "
            f"{format_bytes(round(self.measured.read_bytes_per_s))}/s"
        )

    def _cache_error(self) -> str | None:
        error = self.measured.cache_logit_error
        return error and f"{100 * error.relative:.2f}% of the norm, {error.max_abs:.3f} at most, all else in float32"

    def _cache_rows(self) -> list[tuple[str, str]]:
        if self.compile_cache is None:
            return []
        use = self.compile_cache
        failed = f", {use.failures} that could not be loaded and compiled anew" if use.failures else ""
        return [("compile cache", f"{plural(use.hits, 'graph')} loaded, {use.misses} new{failed}")]

    def _formula_rows(self) -> list[tuple[str, str]]:
        """Exact sizes over all chips beside the post's formulas, which assume bfloat16."""
        formulas, sizes = self.formulas, self.sizes
        weights = format_bytes(self.chips * sizes.parameter_bytes_per_chip)
        cache = format_bytes(self.chips * sizes.kv_cache_bytes_per_chip)
        return [
            ("model's parameters", _beside(format_count(formulas.parameters), format_count(formulas.post_parameters))),
            ("parameters, all chips", _beside(weights, format_bytes(formulas.post_parameter_bytes))),
            ("KV cache, all chips", _beside(cache, format_bytes(formulas.post_cache_bytes))),
        ]


def _beside(fact: str, formula: str) -> str:
    return f"{fact}; the post's formula: {formula}"


def _bytes(count: int | None) -> str:
    return "not reported" if count is None else format_bytes(count)


def _parameters(sizes: Sizes) -> str:
    padding = f", of which padding {format_bytes(sizes.padding_bytes_per_chip)}" if sizes.padding_bytes_per_chip else ""
    return format_bytes(sizes.parameter_bytes_per_chip) + padding


def host_peak_rss_bytes() -> int:
    """The most resident memory that this process has had, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
