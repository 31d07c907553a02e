"""XLA:CPU's linears of 4- and 8-bit values against float64, with groups of all sizes, run by torch and by XLA."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from runtime.model.linears import summed
from runtime.model.linears.codes import PIECE, Coded, Values, layout
from runtime.model.linears.linear import Operations
from runtime.model.linears.summed import VECTOR_ROWS, SummedLinear

SHAPES = [
    (3, 7, 7),
    (3, 7, None),
    (1, 1, 1),
    (5, 64, 2),
    (33, 96, 1),
    (64, 576, 9),
    (7, 1000, None),
    (130, 1376, 43),
    (48, 4096, 32),
    (20, 11008, 86),
]  # out, in, groups or None
ROWS = (1, 2, 4, 5, 8, 9, 40)


class Case(NamedTuple):
    """Values of a kind, their scale and zero points, and what they stand for in float64."""

    kind: Values
    values: torch.Tensor
    scale: torch.Tensor
    zero_points: torch.Tensor | None
    exact: torch.Tensor

    @property
    def groups(self) -> int | None:
        return None if self.scale.dim() == 1 else self.scale.shape[1]

    def linear(self, chips: int | None = None) -> SummedLinear:
        """The linear, its inputs split over ``chips``."""
        parts = self.values.chunk(chips or 1, dim=1)
        held = layout(self.kind, parts[0].shape[1], self.groups and self.groups // len(parts))
        pieces = [held.encode(part) for part in parts]
        pieces = pieces[0] if chips is None else [torch.stack(piece) for piece in zip(*pieces, strict=True)]
        return SummedLinear(Coded(self.kind, pieces, held.halves), self.scale, self.zero_points, Operations())


def _case(out: int, inputs: int, groups: int | None, kind: Values, zero_points: bool) -> Case:
    generator = torch.Generator().manual_seed(out * 10_000 + inputs)
    low, high = (-8, 8) if kind is Values.INT4 else (-128, 128)
    values = torch.randint(low, high, (out, inputs), dtype=torch.int8, generator=generator)
    if kind is Values.FP8:
        values[(values & 127) == 127] = 0  # NaN
        values = values.view(torch.float8_e4m3fn)
    shape = (out,) if groups is None else (out, groups)
    scale = torch.rand(shape, generator=generator) + 0.01
    scale = scale if groups is None else scale.bfloat16()
    zeros = torch.randint(low, high, shape, dtype=torch.int8, generator=generator) if zero_points else None
    exact = values.float().double().view(out, groups or 1, -1)
    if zeros is not None:
        exact = exact - zeros.double().view(out, -1, 1)
    return Case(kind, values, scale, zeros, (exact * scale.double().view(out, -1, 1)).view(out, inputs))


KINDS = [(Values.INT4, False), (Values.INT4, True), (Values.INT8, False), (Values.INT8, True), (Values.FP8, False)]


def _check(found: torch.Tensor, x: torch.Tensor, case: Case) -> None:
    """Within float32's error of what is summed before a zero point is taken off, or bfloat16's of the weight."""
    assert (found.dtype, found.shape) == (x.dtype, (*x.shape[:-1], len(case.exact)))
    exact = x.double() @ case.exact.T
    largest = 16 if case.kind is Values.INT4 else 256
    size = x.double().abs() @ case.exact.abs().T
    if case.kind is not Values.FP8:
        scale = case.scale.double().view(len(case.exact), -1, 1)
        unit = (scale * torch.ones(case.exact.shape[1] // scale.shape[1])).flatten(1)
        size = size + x.double().abs() @ (largest * unit).T
    tolerance = 1e-6 * size
    if x.dtype == torch.bfloat16:
        tolerance = tolerance + 2**-7 * exact.abs()
        if case.groups is not None:
            tolerance = tolerance + 2**-8 * (x.double().square() @ case.exact.square().T).sqrt() * 4
    assert ((found.double() - exact).abs() <= tolerance).all()


def _rows(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 1, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "zero_points"), KINDS)
def test_summed(
    shape: tuple[int, int, int | None], kind: Values, zero_points: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summed, "_BLOCK", 1000)
    case = _case(*shape, kind, zero_points)
    linear = case.linear()
    for rows in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            x = _rows(rows, shape[1], dtype)
            _check(linear(x), x, case)


@pytest.mark.parametrize("chips", [2, 3])
@pytest.mark.parametrize(("local", "groups"), [(5, 5), (576, 9), (96, None)])
@pytest.mark.parametrize(("kind", "zero_points"), KINDS)
def test_summed_with_its_inputs_on_several_chips(
    chips: int, local: int, groups: int | None, kind: Values, zero_points: bool
) -> None:
    case = _case(11, chips * local, groups and chips * groups, kind, zero_points)
    linear = case.linear(chips)
    for rows in (1, 3, 40):
        x = _rows(rows, chips * local, torch.float32)
        _check(linear(x), x, case)


def test_every_code_of_float8_is_exact() -> None:
    codes = torch.tensor([code for code in range(-128, 128) if code & 127 != 127], dtype=torch.int8)
    values = codes.view(torch.float8_e4m3fn)[:, None]
    weight = layout(Values.FP8, 1, None).encode_blocks([values], len(values))
    linear = SummedLinear(weight, torch.ones(len(values)), None, Operations())
    for rows in (1, VECTOR_ROWS[Values.FP8] + 1):
        for dtype in (torch.float32, torch.bfloat16):
            found = linear(torch.ones(rows, 1, dtype=dtype))
            assert torch.equal(found, values.to(dtype).T.expand(rows, -1))


@pytest.mark.parametrize("groups", [43, None])
@pytest.mark.parametrize("kind", list(Values))
def test_encoded_block_by_block(kind: Values, groups: int | None) -> None:
    case = _case(50, 4 * 1376, groups, kind, zero_points=False)
    held = layout(kind, 4 * 1376, groups)
    coded = held.encode_blocks(case.values.split(7), 50)
    assert all(map(torch.equal, coded.pieces, held.encode(case.values)))
    assert (coded.inputs, coded.nbytes) == (4 * 1376, case.values.numel() // held.halves)
    assert max(piece[0].numel() for piece in coded.pieces) * held.halves <= 1.5 * PIECE[kind]
    with pytest.raises(ValueError, match="rows"):
        held.encode_blocks(case.values.split(7), 51)


def test_inputs_are_whole_groups() -> None:
    with pytest.raises(ValueError, match="100 inputs"):
        layout(Values.INT4, 100, 3)
