"""The CPU's forms of a linear against float64, for shapes that no tile, kernel or vector divides."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from quantize.formats.floating import Floating
from quantize.formats.integers import Integers
from runtime.devices.capture import capture
from runtime.model.linears import tiled
from runtime.model.linears.linear import DecodedLinear, Linear, LinearWeight, Operations
from runtime.model.linears.packed import KERNEL_ROWS, LOOP_ROWS, PackedLinear
from runtime.model.linears.tiled import LEFT_ROWS, TILE, VECTOR_ROWS, TiledLinear, Tiles, cut

SHAPES = [
    (1, 1),
    (3, 7),
    (5, 16),
    (33, 40),
    (64, 576),
    (7, 1000),
    (130, 1537),
    (48, 4096),
    (9, 4104),
    (1030, 4100),
]  # out, in
ROWS = (1, 2, VECTOR_ROWS, VECTOR_ROWS + 1, KERNEL_ROWS + 1, LEFT_ROWS, LEFT_ROWS + 1, 128)


def held(values: object, scale: torch.Tensor | None) -> LinearWeight:
    """As loading gives a weight to a linear."""
    if scale is None:
        return LinearWeight(Floating("bfloat16"), {"": values})
    return LinearWeight(Integers(8), {"": values, "_scale": scale})


class Case(NamedTuple):
    """A weight, its scale or None, and what it stands for in float64."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    exact: torch.Tensor


def _case(out: int, inputs: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(out * 10_000 + inputs)
    if dtype == torch.int8:
        weight = torch.randint(-127, 128, (out, inputs), dtype=torch.int8, generator=generator)
        scale = torch.rand(out, generator=generator) + 0.01
        return Case(weight, scale, weight.double() * scale.double()[:, None])
    weight = torch.randn(out, inputs, generator=generator).to(dtype)
    return Case(weight, None, weight.double())


def _rows(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 1, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)


def _check(found: torch.Tensor, x: torch.Tensor, case: Case) -> None:
    """Within float32's error, or within twice the rounding to bfloat16, which the result may be put through twice."""
    assert (found.dtype, found.shape) == (x.dtype, (*x.shape[:-1], len(case.weight)))
    exact = x.double() @ case.exact.T
    size = x.double().abs() @ case.exact.abs().T  # of what was summed
    tolerance = 1e-6 * size + (2**-7 * exact.abs() if x.dtype == torch.bfloat16 else 0)
    assert ((found.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16, torch.float32])
def test_tiled(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "_BLOCK", 17 * TILE)
    case = _case(*shape, dtype)
    for weight in (Tiles([part.contiguous() for part in cut(case.weight)]), case.weight):
        linear = TiledLinear(held(weight, case.scale), Operations())
        for rows in ROWS:
            for activations in (torch.float32, torch.bfloat16):
                x = _rows(rows, shape[1], activations)
                _check(linear(x), x, case)


@pytest.mark.parametrize("chips", [2, 3])
@pytest.mark.parametrize("local", [5, 576, 1100])
def test_tiled_with_its_inputs_on_several_chips(chips: int, local: int) -> None:
    case = _case(11, chips * local, torch.int8)
    parts = [cut(part) for part in case.weight.chunk(chips, dim=1)]
    linear = TiledLinear(
        held(Tiles([torch.stack(tile) for tile in zip(*parts, strict=True)]), case.scale), Operations()
    )
    for rows in ROWS:
        x = _rows(rows, chips * local, torch.float32)
        _check(linear(x), x, case)


@pytest.mark.parametrize("inputs", [1, 100, 512, 576, 1536, 4096, 11008, 22016 // 3])
def test_tiles_are_the_weight_cut(inputs: int) -> None:
    weight = torch.arange(2 * inputs).view(2, inputs)
    tiles = cut(weight)
    assert torch.equal(torch.cat(tiles, dim=1), weight)
    assert all(0 < tile.shape[1] <= 1.5 * TILE for tile in tiles)
    assert all(tile.shape[1] % 16 == 0 for tile in tiles[:-1])
    assert sum(tile.nbytes for tile in tiles) == weight.nbytes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_packed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    case = _case(*shape, dtype)
    linear = PackedLinear(held(case.weight, case.scale))
    for rows in ROWS:
        for activations in (torch.float32, torch.bfloat16):
            if activations == torch.bfloat16 and dtype == torch.float32:
                continue  # a float32 weight is rounded to the activations' dtype
            x = _rows(rows, shape[1], activations)
            _check(linear(x), x, case)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, LOOP_ROWS, 40])
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
def test_packed_under_inductor(rows: int, activations: torch.dtype) -> None:
    """A step of several shapes compiled whole, with the weights not copied."""
    cases = [_case(out, inputs, dtype) for out, inputs in SHAPES[2:8] for dtype in (torch.int8, torch.bfloat16)]
    linears = [PackedLinear(held(case.weight, case.scale)) for case in cases]
    inputs = [_rows(rows, case.weight.shape[1], activations) for case in cases]
    step = capture(lambda xs: [linear(x) for linear, x in zip(linears, xs, strict=True)], "inductor")
    with torch.no_grad():
        for found, x, case in zip(step(inputs), inputs, cases, strict=True):
            _check(found, x, case)
    assert all(linear.weight.data_ptr() == case.weight.data_ptr() for linear, case in zip(linears, cases, strict=True))


@pytest.mark.parametrize("activations", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_rows_are_made_before_inductors_loop(activations: torch.dtype) -> None:
    """Fused into the loop over a weight, what makes the rows would be done anew for every output."""
    case = _case(48, 4096, torch.int8)
    linear = PackedLinear(held(case.weight, case.scale))
    x = _rows(1, 4096, activations)
    with torch.no_grad():
        _, (code,) = run_and_get_code(capture(lambda x: linear(x.erf()), "inductor"), x)
    loops = code.split("for(int64_t x0=")
    kinds = [("Vectorized<int8_t>" in loop, ".erf()" in loop) for loop in loops]
    assert sorted(kind for kind in kinds if any(kind)) == [(False, True), (True, False)]


def test_a_format_without_a_linear_of_its_own_is_decoded() -> None:
    """Also a square weight with one scale for each output channel, which loading gives as [out]."""
    case = _case(96, 96, torch.int8)
    x = _rows(3, 96, torch.float32)
    exact = x.double() @ case.exact.T
    torch.testing.assert_close(DecodedLinear(held(case.weight, case.scale))(x).double(), exact, rtol=1e-4, atol=1e-4)


def test_forms_hold_no_second_weight() -> None:
    case = _case(64, 1600, torch.int8)
    tiles = Tiles([part.contiguous() for part in cut(case.weight)])
    for linear in (TiledLinear(held(tiles, case.scale), Operations()), PackedLinear(held(case.weight, case.scale))):
        kept = [*linear.parameters(), *linear.buffers()]
        assert sum(t.nbytes for t in kept if t.dtype == torch.int8) == case.weight.nbytes
        assert sum(t.nbytes for t in kept if t.dtype != torch.int8) <= 8 * len(case.weight) + 4 * 1600
    assert Linear(held(case.weight, case.scale)).weight is case.weight
