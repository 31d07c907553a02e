"""PyTorch's kernel for 4-bit weights, as Inductor calls it and eagerly, against float64."""

from __future__ import annotations

import pytest
import torch

from quantize.formats.integers import Integers
from runtime.devices.capture import capture
from runtime.model.linears.linear import DecodedLinear, LinearWeight
from runtime.model.linears.packed_int4 import PackedInt4, PackedInt4Linear, int4_linear, kernel_group, pack_int4

# out, in, inputs of a group (None: one scale for each output); outputs that are no multiple of sixteen, and many
SHAPES = [(64, 256, 128), (37, 192, 64), (5, 96, 32), (4200, 64, 32), (33, 320, None), (16, 1024, None)]


def make(
    out: int, inputs: int, group: int | None, has_zeros: bool, scales: torch.dtype = torch.bfloat16
) -> tuple[LinearWeight, torch.Tensor]:
    """A weight, and what it stands for in float64."""
    generator = torch.Generator().manual_seed(out * 10_000 + inputs)
    shape = (out,) if group is None else (out, inputs // group)
    values = torch.randint(-8, 8, (out, inputs), dtype=torch.int8, generator=generator)
    scale = torch.rand(shape, generator=generator) + 0.01
    scale = scale if group is None else scale.to(scales)
    zeros = torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator) if has_zeros else None
    exact = values.double().view(out, -1, group or inputs)
    if zeros is not None:
        exact = exact - zeros.double().view(out, -1, 1)
    exact = (exact * scale.double().view(out, -1, 1)).view(out, inputs)
    tensors = {"_packed": pack_int4(values), "_scale": scale, "_zero_point": zeros}
    return LinearWeight(Integers(4, group, has_zeros, str(scales).removeprefix("torch.")), tensors), exact


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_products(shape: tuple[int, int, int | None], has_zeros: bool, dtype: torch.dtype) -> None:
    weight, exact = make(*shape, has_zeros)
    linear = PackedInt4Linear(weight)
    for rows in (1, 3, 40):
        x = torch.randn(2, rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
        found, expected = linear(x), x.double() @ exact.T
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        error = (found.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_scales_in_float16_are_not_rounded(dtype: torch.dtype) -> None:
    """As bfloat16 would round them, by up to 0.4%; rows in bfloat16 are computed in float32."""
    weight, exact = make(37, 192, 64, True, torch.float16)
    x = torch.randn(1, 3, 192, generator=torch.Generator().manual_seed(3)).to(dtype)
    for run in (PackedInt4Linear(weight), capture(PackedInt4Linear(weight), "inductor")):
        found, expected = run(x), x.double() @ exact.T
        assert found.dtype == dtype
        error = (found.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 2e-3)


@torch.no_grad()
def test_inductor_calls_the_same_kernel() -> None:
    weight, exact = make(37, 192, 64, has_zeros=True)
    linear = PackedInt4Linear(weight)
    x = torch.randn(1, 3, 192)
    found = capture(lambda x: linear(x * 2), "inductor")(x)
    assert torch.allclose(found.double(), 2 * x.double() @ exact.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("inputs", "groups", "size"), [(256, 2, 128), (96, 1, None), (96, None, 32), (40, None, None)])
def test_groups_that_the_kernel_has(inputs: int, groups: int | None, size: int | None) -> None:
    assert kernel_group(inputs, groups) == size


def test_values_take_half_a_byte() -> None:
    packed = pack_int4(torch.zeros(64, 256, dtype=torch.int8))
    assert (packed.nbytes, packed.out) == (64 * 128, 64)


def test_others_are_decoded() -> None:
    weight = LinearWeight(
        Integers(4, 32), {"_packed": torch.zeros(4, 32, dtype=torch.int8), "_scale": torch.ones(4, 1)}
    )
    assert isinstance(int4_linear(weight), DecodedLinear)
    assert isinstance(make(64, 256, 128, False)[0].values, PackedInt4)
