"""Linears of 8-bit weights in groups, and of float8, for Inductor: against float64, compiled and as they are."""

from __future__ import annotations

import pytest
import torch

from quantize.formats.float8 import Float8
from quantize.formats.integers import Integers
from quantize.formats.weight_format import WeightFormat
from runtime.devices.capture import capture
from runtime.model.linears.linear import LinearWeight
from runtime.model.linears.packed8 import LOOP_ROWS, Packed8Linear

FORMATS = [Integers(8, 32), Integers(8, 32, True), Integers(8, None, True), Float8(), Float8(32)]


def make(weight_format: WeightFormat) -> tuple[LinearWeight, torch.Tensor]:
    """An encoded weight, its columns as a device holds them, and what it stands for in float64."""
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(0))
    tensors = weight_format.encode(weight).tensors
    groups = tensors["_scale"].shape[1]
    zero = tensors["_zero_point"].double()[:, :, None] if weight_format.zero_points else 0
    exact = (tensors[""].float().double().view(37, groups, -1) - zero) * tensors["_scale"].double()[:, :, None]
    held = {suffix: each.flatten() if suffix and groups == 1 else each for suffix, each in tensors.items()}
    return LinearWeight(weight_format, held), exact.view(37, 96)


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_products(weight_format: WeightFormat, dtype: torch.dtype) -> None:
    weight, exact = make(weight_format)
    linear = Packed8Linear(weight)
    for rows in (1, 3, LOOP_ROWS + 1):
        x = torch.randn(1, rows, 96, generator=torch.Generator().manual_seed(rows)).to(dtype)
        found, expected = linear(x), x.double() @ exact.T
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        assert (found.double() - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 1e-2)


@torch.no_grad()
def test_every_code_of_float8_is_exact() -> None:
    codes = torch.tensor([code for code in range(-128, 128) if code & 127 != 127], dtype=torch.int8)
    values = codes.view(torch.float8_e4m3fn)[:, None]
    linear = Packed8Linear(LinearWeight(Float8(), {"": values, "_scale": torch.ones(len(values))}))
    assert torch.equal(linear(torch.ones(1, 1)), values.float().T)


@torch.no_grad()
def test_inductor_gives_the_same() -> None:
    weight, exact = make(Float8(32))
    linear = Packed8Linear(weight)
    x = torch.randn(1, 2, 96)
    found = capture(lambda x: linear(x * 2), "inductor")(x)
    assert torch.allclose(found.double(), 2 * x.double() @ exact.T, rtol=1e-5, atol=1e-4)
