"""Predicting a decode step's time: the compiled graph's estimate plus its collectives, fitted to published times.

The compiler prices computation but no collectives. So a prediction is

    max(estimate, roofline) + hop * collectives * log2(chips)

where ``collectives`` are counted in the compiled graph, log2(chips) is the number of pairwise exchanges after which
every chip has the data of all others, and ``hop``, the only fitted value, is the time of one exchange. It is fitted to
all published times there are, by least squares of the relative errors; leaving out each time in turn shows how well
such a model predicts a time that it has not seen. It stays a prediction: no TPU was available to measure on.

That error is slightly optimistic: it was used to choose this form among 25 candidates on the same nine times (the
roofline in place of the estimate, collectives by count, by bytes, by both, with and without log2(chips), ...), with
libtpu 0.0.21's estimates, which are within 0.2% of these. If the choice is repeated in every fold, the error is 5.0% on
average and 10.5% at worst; benchmarks/README.md lists the others. The published programs also differ from these, and
the fitted value absorbs that difference too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean


@dataclass(frozen=True)
class Point:
    """A published time of a decode step in bfloat16 at batch size 1, and what the compiler says about ours there.

    Published times are in ms per token, from "The Path to Achieve Ultra-Low Inference Latency With LLaMA 65B on
    PyTorch/XLA": stated in its text (7B; 65B on v4-32) or read off the bars of its figures 1 and 5. ``estimated_ms``
    and ``collectives`` come from llama-plan --compile with libtpu 0.0.52, as benchmarks/tpu_table.py prints them.
    """

    model: str
    target: str
    chips: int
    published_ms: float
    estimated_ms: float
    collectives: int

    @property
    def exchanges(self) -> float:
        return exchanges(self.collectives, self.chips)


PUBLISHED = (
    Point("7B", "v4-8", 4, 4.7, 3.222, 67),
    Point("7B", "v4-16", 8, 3.8, 1.801, 67),
    Point("33B", "v4-8", 4, 20.8, 17.163, 123),
    Point("33B", "v4-16", 8, 10.9, 7.765, 123),
    Point("65B", "v4-16", 8, 21.2, 16.200, 163),
    Point("65B", "v4-32", 16, 14.5, 7.897, 163),
    Point("65B", "v4-64", 32, 12.7, 4.429, 163),
    Point("175B", "v4-32", 16, 33.3, 23.080, 195),
    Point("175B", "v4-64", 32, 18.5, 10.515, 195),
)
FITTED_GENERATION = "v4"


@dataclass(frozen=True)
class LatencyModel:
    """``hop_s``: seconds of one exchange. Errors are relative, of each point predicted by a fit on the others."""

    hop_s: float
    mean_error: float
    worst_error: float

    def collectives_s(self, collectives: int, chips: int) -> float:
        return self.hop_s * exchanges(collectives, chips)


def exchanges(collectives: int, chips: int) -> float:
    """The number of sequential exchanges between chips that this many collectives take."""
    return collectives * math.log2(chips)


def fit_hop_ms(points: Sequence[Point]) -> float:
    """The time of an exchange, in ms, that minimizes the squared relative errors: one unknown, so in closed form."""
    numerator = sum((p.published_ms - p.estimated_ms) * p.exchanges / p.published_ms**2 for p in points)
    return max(0.0, numerator / sum((p.exchanges / p.published_ms) ** 2 for p in points))


def predicted_ms(point: Point, points: Sequence[Point] = PUBLISHED) -> float:
    """The time of ``point``, in ms, predicted by a model fitted on the other ``points``."""
    hop = fit_hop_ms([other for other in points if other != point])
    return point.estimated_ms + hop * point.exchanges


@lru_cache(maxsize=1)
def latency_model() -> LatencyModel:
    """The model fitted on every published point, with its leave-one-out errors."""
    errors = [abs(predicted_ms(point) / point.published_ms - 1) for point in PUBLISHED]
    return LatencyModel(fit_hop_ms(PUBLISHED) / 1000, fmean(errors), max(errors))
