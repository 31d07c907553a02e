"""The quantizer's arithmetic against float64 written out, element by element."""

from __future__ import annotations

import pytest
import torch

from quantize.int8 import dequantize, quantize_rows, row_error


def _weight(seed: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_scales_are_the_formula(dtype: torch.dtype) -> None:
    weight = _weight(0, 40, 172, dtype)
    quantized = quantize_rows(weight)
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
    quantized = quantize_rows(weight)
    assert ((dequantize(quantized) - weight).abs() <= quantized.scale * 0.5001).all()


def test_rows_are_independent() -> None:
    weight = _weight(2, 30, 64, torch.bfloat16)
    whole = quantize_rows(weight)
    pieces = [quantize_rows(weight[start : start + 7]) for start in range(0, 30, 7)]
    assert torch.equal(whole.values, torch.cat([piece.values for piece in pieces]))
    assert torch.equal(whole.scale, torch.cat([piece.scale for piece in pieces]))


def test_odd_rows() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, -3.0, 0.0], [1e-38, -1e-38, 0.0], [3e38, -1e38, 0.0]])
    values, scale = quantize_rows(weight)
    assert values.tolist()[:2] == [[0, 0, 0], [0, -127, 0]]
    assert scale[0].item() == 1.0
    assert scale[1].item() == pytest.approx(3 / 127)
    assert values.abs().max() <= 127
    assert dequantize(quantize_rows(weight)).isfinite().all()
    assert values.tolist()[3] == [127, -42, 0]


def test_smallest_denormals_do_not_divide_by_zero() -> None:
    weight = torch.tensor([[1e-45, 0.0, -1e-45]])
    values, scale = quantize_rows(weight)
    assert scale.item() > 0
    assert (values.double() * scale.double() - weight.double()).abs().max() < 1e-40


def test_row_error_is_the_difference() -> None:
    weight = _weight(3, 16, 100, torch.bfloat16)
    quantized = quantize_rows(weight)
    exact = (quantized.values.double() * quantized.scale.double() - weight.double()).abs()
    error = row_error(weight, quantized)
    assert error.squared_error == pytest.approx(exact.square().sum().item(), rel=1e-4)
    assert error.squared_weight == pytest.approx(weight.double().square().sum().item(), rel=1e-6)
    assert error.max_error == pytest.approx(exact.max().item(), rel=1e-4)
