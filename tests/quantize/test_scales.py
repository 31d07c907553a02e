"""Groups of weights: their scales against a search in float64, and their values and errors against float64 written out.

What a stored weight means is said here once more, in ``decoded``.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from quantize.formats import scales
from quantize.formats.scales import GroupQuantized, quantize_groups

KINDS = ("normal", "laplace", "outliers")
SCHEMES = [
    pytest.param(
        group, bits, zero_points, search, id=f"{group}-{bits}-{'zeros' if zero_points else 'symmetric'}-{name}"
    )
    for group, bits, zero_points, (search, name) in itertools.product(
        (32, 64, 128, None), (4, 8), (False, True), ((True, "search"), (False, "plain"))
    )
]


def weights(kind: str, rows: int, width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "laplace":  # the distribution's quantiles at the normal one's
        quantile = torch.special.ndtr(drawn)
        drawn = -(quantile - 0.5).sign() * torch.log1p(-2 * (quantile - 0.5).abs())
    elif kind == "outliers":
        drawn[:, 5::97] *= 8
    return (drawn * 0.02).to(dtype)


def decoded(found: GroupQuantized) -> torch.Tensor:
    """The weight [n, in] in float64: of each group (values - zeros) * scale."""
    groups = found.scale.shape[1]
    values = found.values.double().unflatten(1, (groups, -1))
    if found.zeros is not None:
        values = values - found.zeros.double()[:, :, None]
    return (values * found.scale.double()[:, :, None]).flatten(1)


def limits(bits: int, zero_points: bool) -> tuple[int, int]:
    return {4: (-8, 7), 8: (-128, 127) if zero_points else (-127, 127)}[bits]


def least_errors(weight: torch.Tensor, group: int, zero_points: bool) -> torch.Tensor:
    """The least squared error of each group [n * groups] in 4 bits, over 500 scales of either sign, not rounded."""
    each = weight.double().reshape(-1, group)
    if zero_points:
        low, high = each.amin(1, keepdim=True).clamp(max=0), each.amax(1, keepdim=True).clamp(min=0)
        unit = (high - low) / 15
        zero = (-low / unit).round() - 8
    else:
        unit, zero = each.abs().amax(1, keepdim=True) / 7, torch.zeros(())
    best = torch.full((len(each),), torch.inf, dtype=torch.float64)
    factors = torch.linspace(1.1, 0.2, 500, dtype=torch.float64)
    for factor in factors if zero_points else torch.cat([factors, -factors]):
        scale = unit * factor
        values = ((each / scale).round() + zero).clamp(-8, 7) - zero
        best = torch.minimum(best, (values * scale - each).square().sum(1))
    return best


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_squared_error_is_within_two_percent_of_the_least(kind: str, group: int, zero_points: bool) -> None:
    """Within five for 32 inputs and zero points, where a scale above the largest magnitude's may fit best."""
    weight = weights(kind, 64, 2048)
    found, errors = quantize_groups(weight, group, 4, zero_points=zero_points)
    least = least_errors(weight, group, zero_points).sum()
    assert (decoded(found) - weight.double()).square().sum() < (1.05 if zero_points and group == 32 else 1.02) * least
    _, plain = quantize_groups(weight, group, 4, zero_points=zero_points, search=False)
    assert errors.squared_error.sum() < plain.squared_error.sum()


@pytest.mark.parametrize(("group", "bits", "zero_points", "search"), SCHEMES)
def test_values_are_the_nearest_for_the_scale_as_stored(
    group: int | None, bits: int, zero_points: bool, search: bool
) -> None:
    weight = weights("laplace", 9, 384, torch.float32)
    found, _ = quantize_groups(weight, group, bits, zero_points=zero_points, search=search)
    groups = 384 // (group or 384)
    assert found.values.dtype == torch.int8
    assert found.scale.dtype == (torch.bfloat16 if group else torch.float32)
    assert found.scale.shape == (9, groups)
    assert (found.scale > 0).all() or (search and bits == 4 and not zero_points)
    low, high = limits(bits, zero_points)
    zeros = torch.zeros(9, groups, 1, dtype=torch.float64)
    if zero_points:
        assert found.zeros is not None
        assert found.zeros.dtype == torch.int8
        zeros = found.zeros.double()[:, :, None]
        assert zeros.ge(low).all()
        assert zeros.le(high).all()
    else:
        assert found.zeros is None
    ratio = weight.double().unflatten(1, (groups, -1)) / found.scale.double()[:, :, None]
    nearest = (ratio + zeros).clamp(low, high)
    # But for ratios so near to a half that float32 can't tell.
    assert (found.values.double().unflatten(1, (groups, -1)) - nearest).abs().le(0.5 + 1e-4).all()


@pytest.mark.parametrize("group", [32, 128, None])
def test_a_searched_scale_is_negative_for_a_positive_largest_weight(group: int | None) -> None:
    weight = weights("laplace", 9, 384, torch.float32)
    found, _ = quantize_groups(weight, group, 4)
    each = weight.unflatten(1, (384 // (group or 384), -1))
    assert torch.equal(found.scale < 0, each.amax(2) > -each.amin(2))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, None])
def test_without_a_search_the_scale_is_the_formula(group: int | None, bits: int) -> None:
    weight = weights("normal", 9, 128, torch.float32)
    stored = torch.bfloat16 if group else torch.float32
    each = weight.unflatten(1, (128 // (group or 128), -1))
    symmetric, _ = quantize_groups(weight, group, bits, search=False)
    torch.testing.assert_close(symmetric.scale, (each.abs().amax(2) / {4: 7.5, 8: 127}[bits]).to(stored))
    with_zeros, _ = quantize_groups(weight, group, bits, zero_points=True, search=False)
    low, high = each.amin(2).clamp(max=0), each.amax(2).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    torch.testing.assert_close(with_zeros.scale, scale.to(stored))
    assert torch.equal(with_zeros.zeros, ((-low / scale).round() - 2 ** (bits - 1)).to(torch.int8))


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize(("group", "bits", "zero_points", "search"), SCHEMES)
def test_rows_are_independent(
    group: int | None, bits: int, zero_points: bool, search: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whatever is given at once and however it is cut up inside."""
    weight = weights("normal", 23, 1152)
    whole = quantize_groups(weight, group, bits, zero_points=zero_points, search=search)
    monkeypatch.setattr(scales, "BLOCK_ELEMENTS", 2 * 1152)
    pieces = [quantize_groups(part, group, bits, zero_points=zero_points, search=search) for part in weight.split(rows)]
    for kind in (0, 1):
        for index, tensor in enumerate(whole[kind]):
            parts = [piece[kind][index] for piece in pieces]
            assert tensor is None or torch.equal(tensor, torch.cat(parts))


@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_what_is_representable_stays(group: int | None) -> None:
    """Multiples of a bfloat16 by -8 to 7, with -8 or 7 in every group, or both where there are zero points."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-7, 8, (24, 384), generator=generator).unflatten(1, (384 // (group or 384), -1))
    values[:, :, 3] = torch.where(torch.arange(24) % 2 == 0, -8, 7)[:, None]
    scale = torch.rand(*values.shape[:2], 1, generator=generator).add(0.5).bfloat16().float()
    weight = (values * scale).flatten(1)
    found, errors = quantize_groups(weight, group, 4)
    assert torch.equal(decoded(found), weight.double())
    assert errors.max_error.eq(0).all()
    zeros = torch.randint(-8, 8, scale.shape, generator=generator)
    values[:, :, 3], values[:, :, 4] = -8, 7
    weight = ((values - zeros) * scale).flatten(1)
    found, _ = quantize_groups(weight, group, 4, zero_points=True)
    assert torch.equal(decoded(found), weight.double())
    assert torch.equal(found.zeros, zeros.squeeze(2).to(torch.int8))


@pytest.mark.parametrize(("group", "bits", "zero_points", "search"), SCHEMES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_errors_are_the_differences(group: int | None, bits: int, zero_points: bool, search: bool, size: float) -> None:
    weight = weights("laplace", 8, 256, torch.float32) * size
    found, errors = quantize_groups(weight, group, bits, zero_points=zero_points, search=search)
    exact = (decoded(found) - weight.double()).abs()
    torch.testing.assert_close(errors.squared_error, exact.square().sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(errors.squared_weight, weight.double().square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(errors.max_error, exact.amax(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("group", "bits", "zero_points", "search"), SCHEMES)
def test_a_group_of_nothing(group: int | None, bits: int, zero_points: bool, search: bool) -> None:
    weight = weights("normal", 4, 256, torch.float32)
    first = slice(0, group or 256)
    weight[0, first] = 0
    weight[1, first] *= 1e-36
    weight[2, first] *= 1e-42
    found, _ = quantize_groups(weight, group, bits, zero_points=zero_points, search=search)
    assert found.scale[:3, 0].tolist() == [1, 1, 1]
    assert found.values[:3, first].eq(0).all()
    assert found.zeros is None or found.zeros[:3, 0].eq(0).all()
    assert found.scale[3, 0].abs() < 0.1


@pytest.mark.parametrize(("group", "bits", "zero_points", "search"), SCHEMES)
@pytest.mark.parametrize("size", [1e-33, 1e38])
def test_tiny_and_huge_weights(group: int | None, bits: int, zero_points: bool, search: bool, size: float) -> None:
    """Scales are normal numbers, and whatever they are of, values are the same."""
    weight = weights("normal", 4, 256, torch.float32).clamp(-0.05, 0.05) * 50
    found, _ = quantize_groups(weight * size, group, bits, zero_points=zero_points, search=search)
    usual, _ = quantize_groups(weight, group, bits, zero_points=zero_points, search=search)
    assert (found.scale.float().abs() > 2.0**-126).all()
    assert decoded(found).float().isfinite().all()
    relative = (decoded(found) / size - weight.double()).norm() / (decoded(usual) - weight.double()).norm()
    assert 0.9 < relative < 1.1


@pytest.mark.parametrize(("group", "bits", "zero_points", "search"), SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_the_scale_of_its_group(
    group: int | None, bits: int, zero_points: bool, search: bool, bad: float
) -> None:
    weight = weights("normal", 3, 256)
    before, _ = quantize_groups(weight, group, bits, zero_points=zero_points, search=search)
    weight[1, 255] = bad
    found, _ = quantize_groups(weight, group, bits, zero_points=zero_points, search=search)
    expected = torch.ones_like(found.scale, dtype=torch.bool)
    expected[1, -1] = False
    assert torch.equal(found.scale.isfinite(), expected)
    assert torch.equal(found.scale[expected], before.scale[expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_itself_stays(dtype: torch.dtype) -> None:
    weight = weights("normal", 3, 64, dtype)
    before = weight.clone()
    same, _ = quantize_groups(weight.float(), 32, 4)
    found, _ = quantize_groups(weight, 32, 4)
    assert torch.equal(weight, before)
    assert torch.equal(found.values, same.values)
