"""Standard errors cover what they should, by many samples of known mean; small divergences survive float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from runtime.evaluate.graphs import excess
from runtime.evaluate.statistics import Estimate, Positions, divergence, mean, perplexity

SAMPLES, COUNT = 2000, 300


def _samples() -> list[Positions]:
    """Positions of a model that is a little worse than its reference, both of them surprised by the same tokens.

    The means are known: of the model's surprise 3.02, of the reference's 3, of the KL 0.05.
    """
    draw = np.random.default_rng(0)
    found = []
    for _ in range(SAMPLES):
        surprise = draw.gamma(3.0, 1.0, COUNT)
        worse = surprise + 0.02 + draw.normal(0, 0.1, COUNT)
        kl = draw.gamma(2.0, 0.025, COUNT)
        found.append(Positions(np.arange(COUNT), -worse, -surprise, kl, np.ones(COUNT)))
    return found


def _coverage(estimate: Callable[[Positions], Estimate], truth: float) -> float:
    """In how many samples the truth is within 1.96 standard errors."""
    found = [estimate(sample) for sample in _samples()]
    return float(np.mean([abs(each.value - truth) <= 1.96 * each.stderr for each in found]))


def _unpaired_ratio(sample: Positions) -> Estimate:
    """As if both perplexities had been measured on texts of their own."""
    ours, theirs = perplexity(sample.log_probability), perplexity(sample.reference)
    ratio = ours.value / theirs.value
    relative = np.hypot(ours.stderr / ours.value, theirs.stderr / theirs.value)
    return Estimate(ratio, ratio * relative)


def test_standard_errors_cover_the_truth() -> None:
    right = pytest.approx(0.95, abs=0.02)
    assert _coverage(lambda sample: perplexity(sample.log_probability), np.exp(3.02)) == right
    assert _coverage(lambda sample: divergence(sample).reference_perplexity, np.exp(3)) == right
    assert _coverage(lambda sample: divergence(sample).ratio, np.exp(0.02)) == right
    assert _coverage(lambda sample: divergence(sample).kl, 0.05) == right


def test_the_coverage_tells_wrong_formulas() -> None:
    assert _coverage(_unpaired_ratio, np.exp(0.02)) > 0.99
    assert _coverage(lambda sample: mean(-sample.log_probability), np.exp(3.02)) < 0.5


def test_one_position_has_no_standard_error() -> None:
    found = divergence(Positions(*(np.array([value]) for value in (1, -2.0, -1.0, 0.5, 1.0))))
    assert (found.ratio.value, found.ratio.stderr) == (pytest.approx(np.e), None)
    assert (found.kl, found.kl_median, found.kl_max) == (Estimate(0.5, None), 0.5, 0.5)


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 0.3, 1.0, 10.0, 300.0])
def test_divergences_of_any_size_survive_float32(spread: float) -> None:
    """Also where probabilities are zero in float32."""
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(64, 5000, generator=generator)
    other = logits + spread * torch.randn(64, 5000, generator=generator)
    exact = [each.double().log_softmax(-1) for each in (other, logits)]
    wanted = (exact[1].exp() * (exact[1] - exact[0])).sum(-1)
    found = excess(*(each.log_softmax(-1) for each in (other, logits))).sum(-1)
    assert torch.isfinite(found).all()
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=2e-3 if spread < 1e-3 else 1e-4)
