"""Scales chosen by weighted errors against a search of all candidates in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from quantize.calibration.moments import with_output_errors
from quantize.formats.integers import Integers
from quantize.formats.scales import choose_scales, quantize_groups

Cost = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Candidates(NamedTuple):
    """What each of n rows costs, as one group, in roots of weighted squared errors."""

    costs: torch.Tensor  # [n, candidates]
    cost: Cost  # with any scale [n] and zero point [n]
    unsure: torch.Tensor  # [n]: how much worse the choice may be

    def check(self, scale: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Assert that no candidate is much better than the chosen one; returns what that costs [n]."""
        chosen = self.cost(scale.double(), zeros.double())
        assert (chosen <= self.costs.amin(1) + self.unsure).all()
        return chosen


def candidates(rows: torch.Tensor, form: Integers, importance: torch.Tensor | None = None) -> Candidates:
    """For rows [n, size] and ``importance`` [size] of squared errors.

    The candidates are, as docs/quantize.md describes them, 32 fractions of the scale by the largest magnitude, 1/40
    apart; in 8 bits it is that scale alone. For the choice weights are put on a grid of 1/16 of a step, and scales are
    rounded to bfloat16 after it: a weight's error changes by no more than it is moved by, the norm by no more than all
    are.
    """
    rows = rows.double()
    importance = torch.ones(rows.shape[1]).double() if importance is None else importance.double()
    low, high = (-8, 7) if form.bits == 4 else (-128 if form.zero_points else -127, 127)

    def cost(scale: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        scale, zeros = scale[:, None], zeros[:, None]
        whole = ((rows / scale).round() + zeros).clamp(low, high) - zeros
        return ((whole * scale - rows).square() * importance).sum(1).sqrt()

    top, bottom = rows.amax(1), rows.amin(1)
    zeros = torch.zeros(len(rows), dtype=torch.float64)
    if form.zero_points:
        top, bottom = top.clamp(min=0), bottom.clamp(max=0)
        unit = (top - bottom) / (high - low)
        zeros = (-bottom / unit).round() + low
    elif form.bits == 4:
        unit = torch.where(top > -bottom, -top, -bottom) / 7  # the sign that lets -8 stand for the largest
    else:
        unit = torch.maximum(top, -bottom) / 127
    factors = [1 - k / 40 for k in range(32)] if form.bits == 4 else [1.0]
    scales = [unit * factor for factor in factors]
    if form.group_size is not None:
        scales = [scale.bfloat16().double() for scale in scales]
    moved = (1 / 32 + 16 / 512 if form.bits == 4 else 1e-4) * unit.abs()
    unsure = 2 * moved * importance.sum().sqrt()
    return Candidates(torch.stack([cost(scale, zeros) for scale in scales], 1), cost, unsure)


def weights(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) * 0.02


def moments(width: int) -> torch.Tensor:
    """As those of a model's inputs: mostly within a factor of ten, a few a hundred times larger, some zero."""
    draw = torch.Generator().manual_seed(4)
    found = torch.exp(torch.randn(width, generator=draw))
    found[5::37] *= 200
    found[11::50] = 0
    return found


@pytest.mark.parametrize("zero_points", [False, True], ids=["", "zeros"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_as_good_as_brute_force(group: int | None, zero_points: bool) -> None:
    """No choice is worse than the table's resolution allows, and all of them together hardly worse than the best."""
    form, weight, importance = Integers(4, group, zero_points), weights(60, 256), moments(256)
    found, _ = quantize_groups(weight, group, 4, zero_points=zero_points, importance=importance)
    size = group or 256
    for number, start in enumerate(range(0, 256, size)):
        at = slice(start, start + size)
        each = candidates(weight[:, at], form, importance[at])
        zeros = torch.zeros(60) if found.zeros is None else found.zeros[:, number]
        chosen = each.check(found.scale[:, number], zeros)
        assert chosen.sum() <= each.costs.amin(1).sum() * 1.02
        assert (chosen < each.costs[:, 0]).sum() > 30  # it isn't the largest magnitude's


@pytest.mark.parametrize("zero_points", [False, True], ids=["", "zeros"])
@pytest.mark.parametrize("group", [32, 128, None])
def test_the_weighted_error_falls(group: int | None, zero_points: bool) -> None:
    form, weight, importance = Integers(4, group, zero_points), weights(60, 256), moments(256)
    errors = []
    for each in (importance, None):
        made = form.decode(form.encode(weight, importance=each).tensors)
        errors.append(((made - weight).double().square() * importance).sum().item())
    assert errors[0] < 0.97 * errors[1]


def test_alike_is_as_without() -> None:
    """Importance that is the same for all inputs, of any size or zero, changes nothing."""
    weight = weights(40, 128)
    for form in (Integers(4, 32), Integers(4, None), Integers(4, 64, True)):
        plain = form.encode(weight)
        for size in (1.0, 2.0**40, 2.0**-40, 0.0):
            found = form.encode(weight, importance=torch.full((128,), size))
            assert all(torch.equal(found.tensors[suffix], each) for suffix, each in plain.tensors.items()), size


def test_a_group_without_importance() -> None:
    """Where nothing is known of a group's inputs all count alike; other groups are weighted."""
    weight, importance, form = weights(40, 128), moments(128), Integers(4, 32)
    importance[32:64] = 0
    found, plain = form.encode(weight, importance=importance), form.encode(weight)
    assert torch.equal(found.tensors["_scale"][:, 1], plain.tensors["_scale"][:, 1])
    assert not torch.equal(found.tensors["_scale"][:, 0], plain.tensors["_scale"][:, 0])


def test_only_the_input_that_counts() -> None:
    """With one input that counts its weight's error is as small as any candidate makes it."""
    weight, importance, form = weights(40, 32), torch.zeros(32), Integers(4, 32)
    importance[7] = 5.0
    scale = form.encode(weight, importance=importance).tensors["_scale"][:, 0].double()
    each = candidates(weight, form, importance)
    chosen = each.check(scale, torch.zeros(40))
    assert chosen.sum() < each.costs[:, 0].sum() / 3


@pytest.mark.parametrize(
    "form", [Integers(8, None), Integers(8, 64), Integers(8, 64, True)], ids=lambda each: each.name
)
def test_eight_bits_take_the_largest_magnitude(form: Integers) -> None:
    weight = weights(20, 128)
    found, plain = form.encode(weight, importance=moments(128)), form.encode(weight)
    assert all(torch.equal(found.tensors[suffix], each) for suffix, each in plain.tensors.items())


def test_rows_in_any_blocks() -> None:
    """The whole and its parts give the same."""
    weight, importance, form = weights(50, 256), moments(256), Integers(4, 64)
    whole = form.encode(weight, importance=importance)
    for start, stop in ((0, 1), (1, 18), (18, 50)):
        part = form.encode(weight[start:stop], importance=importance)
        assert all(torch.equal(part.tensors[suffix], each[start:stop]) for suffix, each in whole.tensors.items())


def test_one_group_at_a_time() -> None:
    """``choose_scales`` finds for rows that are one group what ``quantize_groups`` finds for the same."""
    weight, importance = weights(50, 64), moments(64)
    for zero_points in (False, True):
        found, _ = quantize_groups(weight, 64, 4, zero_points=zero_points, importance=importance)
        scale, zeros = choose_scales(weight, 4, True, zero_points=zero_points, importance=importance)
        assert torch.equal(scale.bfloat16(), found.scale)
        assert found.zeros is None or torch.equal(zeros.to(torch.int8), found.zeros)


def test_the_outputs_errors_do_not_depend_on_blocks() -> None:
    """Whole and row by row to the bit, for as many inputs as large models have."""
    weight, importance, form = weights(203, 11008), moments(11008), Integers(8)

    def errors(rows: torch.Tensor) -> list[torch.Tensor]:
        return list(with_output_errors(form.encode(rows), rows, form, importance))

    parts = zip(*(errors(weight[start : start + 7]) for start in range(0, 203, 7)), strict=True)
    assert all(torch.equal(torch.cat(part), whole) for part, whole in zip(parts, errors(weight), strict=True))
    difference = form.decode(form.encode(weight).tensors).double() - weight.double()
    torch.testing.assert_close(errors(weight)[3], difference.square() @ importance.double())
