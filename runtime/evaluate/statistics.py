"""From values of single positions to figures with standard errors.

A mean's standard error is the sample's standard deviation over the square root of the number of positions, as if these
were independent. What is computed from a mean gets its own by the delta method: exp(m) has exp(m) times m's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Positions:
    """Values of n predicted tokens, in the order of the text; float64 [n] but for ``place``. Nats, where not said."""

    place: np.ndarray  # of the token in its window, int64 [n]: 1 for the first that is predicted
    log_probability: np.ndarray  # of the token that the text has, under the model
    reference: np.ndarray | None = None  # the same under the reference; None without one, as below
    kl: np.ndarray | None = None  # of the model from the reference
    same_first: np.ndarray | None = None  # 1 where both have the same most probable token, else 0

    def __len__(self) -> int:
        return len(self.place)


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, which is None where a single position tells nothing of it."""

    value: float
    stderr: float | None

    def exponential(self) -> Estimate:
        """exp of it."""
        value = math.exp(self.value)
        return Estimate(value, None if self.stderr is None else value * self.stderr)


def mean(values: np.ndarray) -> Estimate:
    """The mean of values [n], n >= 1."""
    count = len(values)
    stderr = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    return Estimate(float(values.mean()), stderr)


def perplexity(log_probabilities: np.ndarray) -> Estimate:
    """exp of the mean surprise at tokens with these log-probabilities [n]."""
    return mean(-log_probabilities).exponential()


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from a reference's."""

    reference_perplexity: Estimate
    ratio: Estimate  # of the model's perplexity to the reference's
    kl: Estimate  # the mean, in nats per token
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    same_first: float  # share of positions
    delta_p_rms: float  # of the probability of the token that the text has


def divergence(positions: Positions) -> Divergence:
    """The figures of positions that have a reference.

    Both perplexities vary alike from token to token, so the ratio's standard error is that of paired differences: much
    less than what two independent perplexities would give.
    """
    ours, theirs, kl = positions.log_probability, positions.reference, positions.kl
    median, p99, p999, largest = np.quantile(kl, [0.5, 0.99, 0.999, 1.0])
    return Divergence(
        reference_perplexity=perplexity(theirs),
        ratio=mean(theirs - ours).exponential(),
        kl=mean(kl),
        kl_median=float(median),
        kl_p99=float(p99),
        kl_p999=float(p999),
        kl_max=float(largest),
        same_first=float(positions.same_first.mean()),
        delta_p_rms=float(np.sqrt(np.mean((np.exp(ours) - np.exp(theirs)) ** 2))),
    )
