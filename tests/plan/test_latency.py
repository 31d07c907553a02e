"""The model of latency against numpy's least squares, and its leave-one-out errors by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from runtime.plan.latency import PUBLISHED, Point, exchanges, fit_hop_ms, latency_model, predicted_ms


def _solved(points: list[Point]) -> float:
    """The same fit by numpy: every equation divided by its published time."""
    weights = 1 / np.array([point.published_ms for point in points])
    column = np.array([point.collectives * math.log2(point.chips) for point in points])
    rest = np.array([point.published_ms - point.estimated_ms for point in points])
    return np.linalg.lstsq((column * weights)[:, None], rest * weights, rcond=None)[0].item()


def test_fit_is_least_squares_of_relative_errors() -> None:
    assert fit_hop_ms(PUBLISHED) == pytest.approx(_solved(list(PUBLISHED)))
    assert latency_model().hop_s == pytest.approx(fit_hop_ms(PUBLISHED) / 1000)


def test_a_point_does_not_foretell_itself() -> None:
    """What is foretold for a point stays the same whatever was published for it."""
    for place, point in enumerate(PUBLISHED):
        others = [*PUBLISHED[:place], *PUBLISHED[place + 1 :]]
        changed = Point(point.model, point.target, point.chips, 99.0, point.estimated_ms, point.collectives)
        expected = point.estimated_ms + _solved(others) * point.collectives * math.log2(point.chips)
        assert predicted_ms(point) == pytest.approx(expected)
        assert predicted_ms(changed, [*others, changed]) == pytest.approx(expected)


def test_errors_are_those_of_points_left_out() -> None:
    errors = [abs(predicted_ms(point) / point.published_ms - 1) for point in PUBLISHED]
    model = latency_model()
    assert model.mean_error == pytest.approx(sum(errors) / 9)
    assert model.worst_error == max(errors)
    assert model.worst_error < 0.15


def test_known_times_are_found_again() -> None:
    """Points made by the model itself with 12 us an exchange."""
    made = [
        Point("", "", chips, 5 + 0.012 * count * math.log2(chips), 5, count)
        for chips, count in ((4, 60), (8, 60), (32, 90))
    ]
    assert fit_hop_ms(made) == pytest.approx(0.012)
    assert predicted_ms(made[0], made) == pytest.approx(made[0].published_ms)


def test_one_chip_has_nobody_to_wait_for() -> None:
    assert exchanges(65, 1) == 0
    assert exchanges(65, 8) == 195
