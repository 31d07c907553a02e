"""The quantizer's arithmetic against float64 written out, element by element."""

from __future__ import annotations

import pytest
import torch

from quantize.formats.int8 import quantize_rows


def dequantized(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return values.float() * scale


def _weight(seed: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_scales_are_the_formula(dtype: torch.dtype) -> None:
    weight = _weight(0, 40, 172, dtype)
    quantized, _ = quantize_rows(weight)
    exact = weight.double()
    scale = exact.abs().amax(1, keepdim=True) / 127
    assert quantized.scale.dtype == torch.float32
    torch.testing.assert_close(quantized.scale.double(), scale, rtol=1e-7, atol=0)
    ratio = exact / quantized.scale.double()
    # The nearest whole number, but for ratios so near to a half that float32 can't tell.
    assert ((quantized.values.double() - ratio).abs() <= 0.5 + 1e-4).all()
    assert quantized.values.abs().amax(1).eq(127).all()


def test_error_is_at_most_half_a_step() -> None:
    weight = _weight(1, 64, 512)
    quantized, _ = quantize_rows(weight)
    assert ((dequantized(*quantized) - weight).abs() <= quantized.scale * 0.5001).all()


def test_rows_are_independent() -> None:
    weight = _weight(2, 30, 64, torch.bfloat16)
    whole, _ = quantize_rows(weight)
    pieces = [quantize_rows(weight[start : start + 7])[0] for start in range(0, 30, 7)]
    assert torch.equal(whole.values, torch.cat([piece.values for piece in pieces]))
    assert torch.equal(whole.scale, torch.cat([piece.scale for piece in pieces]))


def test_odd_rows() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, -3.0, 0.0], [1e-38, -1e-38, 0.0], [3e38, -1e38, 0.0]])
    (values, scale), _ = quantize_rows(weight)
    assert values.tolist()[:2] == [[0, 0, 0], [0, -127, 0]]
    assert scale[0].item() == 1.0
    assert scale[1].item() == pytest.approx(3 / 127)
    assert values.abs().max() <= 127
    assert dequantized(*quantize_rows(weight)[0]).isfinite().all()
    assert values.tolist()[3] == [127, -42, 0]


def test_smallest_denormals_do_not_divide_by_zero() -> None:
    weight = torch.tensor([[1e-45, 0.0, -1e-45]])
    (values, scale), _ = quantize_rows(weight)
    assert scale.item() > 0
    assert (values.double() * scale.double() - weight.double()).abs().max() < 1e-40


def test_error_is_the_difference() -> None:
    weight = _weight(3, 16, 100, torch.bfloat16)
    quantized, errors = quantize_rows(weight)
    exact = (quantized.values.double() * quantized.scale.double() - weight.double()).abs()
    torch.testing.assert_close(errors.squared_error, exact.square().sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(errors.squared_weight, weight.double().square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(errors.max_error, exact.amax(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_the_scale_of_its_row(bad: float) -> None:
    weight = _weight(4, 3, 20)
    weight[1, 7] = bad
    (_, scale), _ = quantize_rows(weight)
    assert scale.isfinite().flatten().tolist() == [True, False, True]


def test_the_weight_itself_stays() -> None:
    weight = _weight(5, 3, 20)
    before = weight.clone()
    quantize_rows(weight)
    assert torch.equal(weight, before)
