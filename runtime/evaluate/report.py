"""What an evaluation found, as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from converters.console.units import format_seconds, plural
from runtime.evaluate.statistics import Divergence, Estimate, Positions, divergence, perplexity


@dataclass(frozen=True)
class Evaluation:
    """Everything that is reported about one evaluation."""

    model: str
    weights: str  # their format, as shards.json names it
    tokens: int  # of the text
    windows: int
    window: int  # tokens of each, but for the last
    positions: Positions
    against: str | None  # the reference's name; None without one
    against_weights: str | None
    by_layer: list[float] | None  # the mean KL in nats per token after one layer, two and so on
    dtype: str
    kv_cache_dtype: str
    activations: str
    platform: str
    chips: int
    recompilations: int
    seconds: float  # of going over the text, with both models; without loading and compiling

    @cached_property
    def perplexity(self) -> Estimate:
        return perplexity(self.positions.log_probability)

    @cached_property
    def divergence(self) -> Divergence | None:
        """From the reference; None without one."""
        return None if self.against is None else divergence(self.positions)

    def to_json(self) -> dict[str, Any]:
        """The content of --json; docs/formats.md describes it."""
        against = {} if self.divergence is None else {"against": self._against_json()}
        by_layer = {} if self.by_layer is None else {"by_layer": self.by_layer}
        return {
            "model": self.model,
            "weights": self.weights,
            "tokens": self.tokens,
            "windows": self.windows,
            "window": self.window,
            "predictions": len(self.positions),
            "perplexity": self.perplexity.value,
            "perplexity_stderr": self.perplexity.stderr,
            **against,
            **by_layer,
            "dtype": self.dtype,
            "kv_cache_dtype": self.kv_cache_dtype,
            "activations": self.activations,
            "platform": self.platform,
            "chips": self.chips,
            "recompilations": self.recompilations,
            "seconds": self.seconds,
        }

    def _against_json(self) -> dict[str, Any]:
        found = self.divergence
        return {
            "model": self.against,
            "weights": self.against_weights,
            "perplexity": found.reference_perplexity.value,
            "perplexity_stderr": found.reference_perplexity.stderr,
            "ratio": found.ratio.value,
            "ratio_stderr": found.ratio.stderr,
            "kl_mean": found.kl.value,
            "kl_stderr": found.kl.stderr,
            "kl_median": found.kl_median,
            "kl_p99": found.kl_p99,
            "kl_p999": found.kl_p999,
            "kl_max": found.kl_max,
            "same_first": found.same_first,
            "delta_p_rms": found.delta_p_rms,
        }

    def table(self) -> str:
        """The figures as lines of text, aligned."""
        text = f"{plural(self.tokens, 'token')} in {plural(self.windows, 'window')} of {self.window}"
        rows = [
            ("model", f"{self.model}, {self.weights}"),
            ("platform", f"{self.platform}, {plural(self.chips, 'chip')}, {self._computed_in()}"),
            ("text", f"{text}, {plural(len(self.positions), 'prediction')}"),
            ("perplexity", _with_error(self.perplexity, 4)),
            *self._against_rows(),
            ("time", f"{format_seconds(self.seconds)} over the text"),
            ("recompilations", str(self.recompilations)),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)

    def _computed_in(self) -> str:
        cache = "" if self.kv_cache_dtype == self.dtype else f", {self.kv_cache_dtype} cache"
        activations = "" if self.activations == "auto" else f", {self.activations} activations"
        return self.dtype + cache + activations

    def _against_rows(self) -> list[tuple[str, str]]:
        found = self.divergence
        if found is None:
            return []
        rows = [
            ("against", f"{self.against}, {self.against_weights}"),
            ("its perplexity", _with_error(found.reference_perplexity, 4)),
            ("ratio of perplexities", _with_error(found.ratio, 5)),
            ("mean KL", f"{_with_error(found.kl, 6)} nats per token"),
            ("median KL", f"{found.kl_median:.6f}"),
            ("99% of KL are below", f"{found.kl_p99:.6f}"),
            ("99.9% of KL are below", f"{found.kl_p999:.6f}"),
            ("largest KL", f"{found.kl_max:.6f}"),
            ("same first token", f"{found.same_first:.2%} of positions"),
            ("RMS change of p", f"{found.delta_p_rms:.2%}, of the text's own tokens"),
        ]
        layers = [(f"mean KL after {plural(n, 'layer')}", f"{kl:.6f}") for n, kl in enumerate(self.by_layer or [], 1)]
        return rows + layers


def _with_error(estimate: Estimate, digits: int) -> str:
    error = "" if estimate.stderr is None else f" +- {estimate.stderr:.{digits}f}"
    return f"{estimate.value:.{digits}f}{error}"
