"""The figures of a run, in the terms of the post: latency T, per-token latency T / L, throughput B * L / T.

T is the time of the L decode steps; prefill, loading and compiling stand apart.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any

from converters.config import ModelConfig
from converters.units import format_bytes, format_count, plural
from runtime.backend import CacheUse
from runtime.generate import Generation
from runtime.sizing import parameter_count, post_cache_bytes, post_parameter_bytes, post_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes per chip, and of the host process; ``device_peak_bytes`` is None where the device keeps no account."""

    parameter_bytes_per_chip: int
    padding_bytes_per_chip: int  # of the parameters: what splitting over these chips adds
    kv_cache_bytes_per_chip: int
    kv_cache_dtype: str
    step_bytes_per_chip: int  # of weights and cache, that a decode step must read
    device_peak_bytes: int | None
    host_peak_rss_bytes: int


@dataclass(frozen=True)
class Bandwidth:
    """What a decode step must read, on all chips together, against what their memory was measured to give."""

    step_bytes: int
    read_bytes_per_s: float

    def utilisation(self, step_s: float) -> float:
        """Model bandwidth utilisation: the share of the measured bandwidth that steps of this time make use of."""
        return self.step_bytes / step_s / self.read_bytes_per_s


@dataclass(frozen=True)
class Formulas:
    """Exact sizes of the whole model beside what the post's formulas say (sizing.py)."""

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
    """Logits through a cache of one dtype against those through a cache of the activations' dtype."""

    max_abs: float
    relative: float  # the norm of the difference over the norm


@dataclass(frozen=True)
class Run:
    """All that is reported of one run."""

    model: str
    platform: str
    chips: int
    batch_size: int
    prompt_tokens: int  # of the longest row
    load_s: float
    compile_s: float
    recompilations: int
    memory: Memory
    bandwidth: Bandwidth
    formulas: Formulas
    compile_cache: CacheUse | None  # None where none was asked for
    cache_logit_error: LogitError | None  # None for a cache of the activations' dtype
    generation: Generation
    end_tokens: str | None  # None where config.json has them all
    text: list[str] | None

    @property
    def step_s(self) -> float:
        """The per-token latency T / L, in seconds."""
        return self.generation.decode_s / self.generation.steps

    def to_json(self) -> dict[str, Any]:
        """The run under the keys that scripts rely on; times in the units that the keys name."""
        generation, memory = self.generation, self.memory
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
                "step_bytes": self.bandwidth.step_bytes,
                "read_bytes_per_s": self.bandwidth.read_bytes_per_s,
                "utilisation": self.bandwidth.utilisation(self.step_s),
            },
            "memory": {
                "parameter_bytes_per_chip": memory.parameter_bytes_per_chip,
                "kv_cache_bytes_per_chip": memory.kv_cache_bytes_per_chip,
                "kv_cache_dtype": memory.kv_cache_dtype,
                "device_peak_bytes": memory.device_peak_bytes,
                "host_peak_rss_bytes": memory.host_peak_rss_bytes,
            },
            "kv_cache_logit_error": self.cache_logit_error and asdict(self.cache_logit_error),
            "formulas": asdict(self.formulas),
            "token_ids": generation.token_ids,
            "text": self.text,
        }

    def table(self) -> str:
        """The figures as lines of text."""
        memory, generation = self.memory, self.generation
        peak = "not reported" if memory.device_peak_bytes is None else format_bytes(memory.device_peak_bytes)
        rows = [
            ("model", self.model),
            ("platform", f"{self.platform}, {plural(self.chips, 'chip')}"),
            ("batch size (B)", self.batch_size),
            ("prompt tokens", self.prompt_tokens),
            ("new tokens (L)", generation.steps),
            ("latency (T)", f"{generation.decode_s:.3f} s"),
            ("per-token latency (T/L)", f"{1000 * self.step_s:.2f} ms"),
            ("throughput (B*L/T)", f"{self.batch_size / self.step_s:.2f} tokens/s"),
            ("bandwidth utilisation", self._utilisation()),
            ("prefill", f"{1000 * generation.prefill_s:.1f} ms, {plural(generation.prefill_executions, 'execution')}"),
            ("first token after", f"{1000 * generation.first_token_s:.1f} ms"),
            ("load", f"{self.load_s:.2f} s"),
            ("compile (warm-up)", f"{self.compile_s:.2f} s"),
            *self._cache_rows(),
            ("recompilations", self.recompilations),
            ("parameters per chip", _parameters(memory)),
            ("KV cache per chip", f"{format_bytes(memory.kv_cache_bytes_per_chip)}, {memory.kv_cache_dtype}"),
            *([("end tokens", self.end_tokens)] if self.end_tokens else []),
            ("device peak", peak),
            ("host peak RSS", format_bytes(memory.host_peak_rss_bytes)),
            *self._formula_rows(),
        ]
        if self.cache_logit_error is not None:
            error = self.cache_logit_error
            rows.append(
                ("logit error of the cache", f"{100 * error.relative:.2f}% of the norm, {error.max_abs:.3f} at most")
            )
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)

    def _utilisation(self) -> str:
        share, bandwidth = self.bandwidth.utilisation(self.step_s), self.bandwidth
        return (
            f"{100 * share:.0f}%: {format_bytes(bandwidth.step_bytes)} a step, memory read at "
            f"{format_bytes(round(bandwidth.read_bytes_per_s))}/s"
        )

    def _cache_rows(self) -> list[tuple[str, str]]:
        if self.compile_cache is None:
            return []
        use = self.compile_cache
        failed = f", {use.failures} that this version of the compiler's library can't load" if use.failures else ""
        return [("compile cache", f"{plural(use.hits, 'graph')} loaded, {use.misses} new{failed}")]

    def _formula_rows(self) -> list[tuple[str, str]]:
        """Facts of all chips together next to the post's formulas, which count bfloat16."""
        formulas, memory = self.formulas, self.memory
        weights = format_bytes(self.chips * memory.parameter_bytes_per_chip)
        cache = format_bytes(self.chips * memory.kv_cache_bytes_per_chip)
        return [
            ("model's parameters", _beside(format_count(formulas.parameters), format_count(formulas.post_parameters))),
            ("parameters, all chips", _beside(weights, format_bytes(formulas.post_parameter_bytes))),
            ("KV cache, all chips", _beside(cache, format_bytes(formulas.post_cache_bytes))),
        ]


def _beside(fact: str, formula: str) -> str:
    return f"{fact}; the post's formula: {formula}"


def _parameters(memory: Memory) -> str:
    padding = (
        f", of which padding {format_bytes(memory.padding_bytes_per_chip)}" if memory.padding_bytes_per_chip else ""
    )
    return format_bytes(memory.parameter_bytes_per_chip) + padding


def host_peak_rss_bytes() -> int:
    """The most resident memory that this process has had, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
