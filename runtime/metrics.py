"""The figures of a run, in the terms of the post: latency T, per-token latency T / L, throughput B * L / T.

T is the time of the L decode steps; prefill, loading and compiling stand apart.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import Any

from converters.units import format_bytes, plural
from runtime.generate import Generation


@dataclass(frozen=True)
class Memory:
    """Bytes per chip, and of the host process; ``device_peak`` is None where the device keeps no account."""

    parameter_bytes_per_chip: int
    padding_bytes_per_chip: int  # of the parameters: what splitting over these chips adds
    kv_cache_bytes_per_chip: int
    device_peak_bytes: int | None
    host_peak_rss_bytes: int


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
    generation: Generation
    text: list[str] | None

    def to_json(self) -> dict[str, Any]:
        """The run under the keys that scripts rely on; times in the units that the keys name."""
        generation = self.generation
        return {
            "model": self.model,
            "platform": self.platform,
            "chips": self.chips,
            "batch_size": self.batch_size,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": generation.steps,
            "latency_s": generation.decode_s,
            "per_token_latency_ms": 1000 * generation.decode_s / generation.steps,
            "throughput_tokens_per_s": self.batch_size * generation.steps / generation.decode_s,
            "prefill_ms": 1000 * generation.prefill_s,
            "load_s": self.load_s,
            "compile_s": self.compile_s,
            "recompilations": self.recompilations,
            "memory": {
                "parameter_bytes_per_chip": self.memory.parameter_bytes_per_chip,
                "kv_cache_bytes_per_chip": self.memory.kv_cache_bytes_per_chip,
                "device_peak_bytes": self.memory.device_peak_bytes,
                "host_peak_rss_bytes": self.memory.host_peak_rss_bytes,
            },
            "token_ids": generation.token_ids,
            "text": self.text,
        }

    def table(self) -> str:
        """The figures as lines of text."""
        figures, memory = self.to_json(), self.memory
        peak = "not reported" if memory.device_peak_bytes is None else format_bytes(memory.device_peak_bytes)
        rows = (
            ("model", self.model),
            ("platform", f"{self.platform}, {plural(self.chips, 'chip')}"),
            ("batch size", self.batch_size),
            ("prompt tokens", self.prompt_tokens),
            ("new tokens (L)", figures["new_tokens"]),
            ("latency (T)", f"{figures['latency_s']:.3f} s"),
            ("per-token latency (T/L)", f"{figures['per_token_latency_ms']:.2f} ms"),
            ("throughput (B*L/T)", f"{figures['throughput_tokens_per_s']:.2f} tokens/s"),
            ("prefill", f"{figures['prefill_ms']:.1f} ms, {plural(self.generation.prefill_executions, 'execution')}"),
            ("load", f"{self.load_s:.2f} s"),
            ("compile (warm-up)", f"{self.compile_s:.2f} s"),
            ("recompilations", self.recompilations),
            ("parameters per chip", _parameters(memory)),
            ("KV cache per chip", format_bytes(memory.kv_cache_bytes_per_chip)),
            ("device peak", peak),
            ("host peak RSS", format_bytes(memory.host_peak_rss_bytes)),
        )
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _parameters(memory: Memory) -> str:
    padding = (
        f", of which padding {format_bytes(memory.padding_bytes_per_chip)}" if memory.padding_bytes_per_chip else ""
    )
    return format_bytes(memory.parameter_bytes_per_chip) + padding


def host_peak_rss_bytes() -> int:
    """The most resident memory that this process has had, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
