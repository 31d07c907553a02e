"""Linears of weights in pieces, and of activations in int8, against float64; as they are and on virtual chips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import virtual_chips
from torch import nn

from quantize.formats.integers import Integers
from quantize.slices import find_slice
from runtime.devices import pjrt
from runtime.devices.tracing import TracedTensor, Tracer, kept_in_shape, product_in_int32
from runtime.model.linears.grouped import GroupedLinear, cut_into_pieces, piece_size
from runtime.model.linears.int8_activations import Int8ActivationsLinear, rounded_to_int8
from runtime.model.linears.linear import LinearWeight, Operations
from runtime.plan.hlo import parse_module
from runtime.plan.tpu_compiler import TPUCompiler

CHIPS = 4
TORCH = Operations()
# out, in, inputs of a group (None: one scale for each output)
SHAPES = [(5, 32, 32), (7, 256, 128), (3, 192, 64), (4, 86, 43), (6, 516, 129), (9, 1376, 32), (5, 1376, None)]
CACHE = [TracedTensor((2,), torch.float32, None)]


class Weight:
    """Random values [out, in] of 4 bits, and what else they have, as a format gives it; ``exact`` is float64."""

    def __init__(self, out: int, inputs: int, group: int | None, has_zeros: bool = False) -> None:
        generator = torch.Generator().manual_seed(out * 10_000 + inputs)
        groups = 1 if group is None else inputs // group
        self.values = torch.randint(-8, 8, (out, inputs), dtype=torch.int8, generator=generator)
        self.scale = torch.rand(out, groups, generator=generator) + 0.01
        self.scale = self.scale.bfloat16() if group else self.scale
        self.zeros = torch.randint(-8, 8, (out, groups), dtype=torch.int8, generator=generator) if has_zeros else None
        self.group = group
        by_group = self.values.double().unflatten(1, (groups, -1))
        zeros = self.zeros.double()[:, :, None] if has_zeros else 0
        self.exact = ((by_group - zeros) * self.scale.double()[:, :, None]).flatten(1)
        self.size = ((by_group.abs() + abs(zeros)) * self.scale.double()[:, :, None]).flatten(1)

    def laid_out(self) -> list[torch.Tensor]:
        """Values, scale and zero points as ``grouped`` takes them."""
        scale = self.scale.T.float().contiguous() if self.group else self.scale[:, 0]
        zeros = (
            []
            if self.zeros is None
            else [self.zeros.T.float().contiguous() if self.group else self.zeros[:, 0].float()]
        )
        return [cut_into_pieces(self.values, self.group), scale, *zeros]


def held(values: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None = None) -> LinearWeight:
    return LinearWeight(Integers(8), {"": values, "_scale": scale, "_zero_point": zeros})


def grouped(*tensors: torch.Tensor, operations: Operations = TORCH) -> GroupedLinear:
    return GroupedLinear(held(*tensors), operations)


def of_integers(values: torch.Tensor, scale: torch.Tensor, operations: Operations) -> Int8ActivationsLinear:
    return Int8ActivationsLinear(replace(held(values, scale), splits_inputs=True), operations)


def rows_of(inputs: int, dtype: torch.dtype, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 1, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)


def check(found: torch.Tensor, x: torch.Tensor, weight: Weight) -> None:
    """Within the rounding of the result and of every scaled value to x's dtype."""
    assert (found.dtype, found.shape) == (x.dtype, (*x.shape[:-1], len(weight.values)))
    exact, size = x.double() @ weight.exact.T, x.double().abs() @ weight.size.T
    off, step = (
        (found.double() - exact).abs(),
        2**-8 if x.dtype == torch.bfloat16 else 2**-20,
    )
    assert (off <= step * size).all()
    assert (off <= 2**-5 * exact.square().mean().sqrt()).all() or len(weight.values) < 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped(shape: tuple[int, int, int | None], has_zeros: bool, dtype: torch.dtype) -> None:
    weight = Weight(*shape, has_zeros)
    x = rows_of(shape[1], dtype)
    check(grouped(*weight.laid_out())(x), x, weight)


def test_grouped_of_float8() -> None:
    weight = Weight(7, 256, 128)
    values, scale = weight.laid_out()
    x = rows_of(256, torch.bfloat16)
    check(grouped(values.to(torch.float8_e4m3fn), scale)(x), x, weight)


def test_zero_points_and_a_large_mean() -> None:
    """Where all inputs are about alike, nearly all of the product is taken off again."""
    weight = Weight(64, 1024, 128, has_zeros=True)
    x = (rows_of(1024, torch.float32) + 10).bfloat16()
    exact = x.double() @ weight.exact.T
    found = grouped(*weight.laid_out())(x).double()
    assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("inputs", "size"), [(128, 64), (64, 64), (32, 32), (1376, 43), (43, 43), (129, 43), (67, 1)])
def test_the_size_of_pieces(inputs: int, size: int) -> None:
    assert piece_size(inputs) == size


def test_pieces_are_consecutive_inputs() -> None:
    weight = torch.arange(2 * 256, dtype=torch.int16).view(2, 256)
    pieces = cut_into_pieces(weight, 128)
    assert pieces.shape == (2, 2, 64, 2)
    assert pieces.is_contiguous()
    assert torch.equal(pieces.flatten(0, 2), weight.T)
    assert cut_into_pieces(weight, 64).shape == (4, 64, 2)
    assert cut_into_pieces(weight).shape == (4, 64, 2)
    with pytest.raises(ValueError, match="whole groups"):
        cut_into_pieces(weight, 96)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_activations(parts: int, dtype: torch.dtype) -> None:
    """The product of the rounded activations is exact; rounding them costs half a unit each."""
    weight = Weight(9, 1376, None)
    x = rows_of(1376, dtype)
    found = of_integers(weight.values, weight.scale[:, 0], Operations(chips=parts))(x)
    rows, unit = rounded_to_int8(x.unflatten(-1, (parts, -1)))
    rounded = (rows.double() * unit.double()).flatten(-2)
    assert ((rounded - x.double()).unflatten(-1, (parts, -1)).abs() <= 0.501 * unit).all()
    exact = rounded @ weight.exact.T
    step = 2**-8 if dtype == torch.bfloat16 else 2**-22
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= step * parts * (exact.abs() + exact.norm())).all()


def test_a_row_of_zeros_in_int8() -> None:
    linear = of_integers(torch.ones(3, 8, dtype=torch.int8), torch.ones(3), TORCH)
    assert linear(torch.zeros(2, 8)).tolist() == [[0.0] * 3] * 2


def on_chips(make: Any, held: list[tuple[torch.Tensor, int | None]], x: torch.Tensor) -> torch.Tensor:
    """``make`` of these tensors, each split over virtual chips on its axis, run on x."""
    virtual_chips.start()
    mesh, tracer = pjrt.Mesh(pjrt.start("cpu")[:CHIPS], "cpu"), Tracer()

    def place(tensor: torch.Tensor, axis: int | None) -> Any:
        return mesh.place([tensor] * CHIPS if axis is None else list(tensor.chunk(CHIPS, axis)), axis)

    placed = [tracer.placeholder(each.shape, each.dtype, axis, place(each, axis)) for each, axis in held]
    linear: nn.Module = make(*placed)

    def function(x: torch.Tensor, caches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [linear(x)], [caches[0] + 1]

    with torch.no_grad():
        traced = tracer.trace(function, [TracedTensor(tuple(x.shape), x.dtype, None), CACHE], donates=1, exact=True)
    inputs = [traced.held.get(index) for index in range(len(traced.graph.inputs))]
    for index, argument in traced.arguments.items():
        inputs[index] = place([x, torch.zeros(2)][argument], None)
    return pjrt.to_host(mesh.compile(traced.graph)(inputs)[0])


@pytest.mark.parametrize("splits_inputs", [False, True])
@pytest.mark.parametrize("shape", [(8, 512, 128), (8, 256, 64), (4, 4 * 43, 43), (8, 512, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_on_chips(shape: tuple[int, int, int | None], splits_inputs: bool, dtype: torch.dtype) -> None:
    weight = Weight(*shape, has_zeros=shape[2] is not None)
    placed = []
    for tensor in weight.laid_out():
        kind = tensor.view(torch.int4) if tensor.dtype == torch.int8 else tensor
        axis = 0 if splits_inputs else tensor.dim() - 1
        placed.append((kind, None if splits_inputs and tensor.dim() == 1 else axis))
    operations = Operations(kept_in_shape=kept_in_shape)

    def make(*tensors: torch.Tensor) -> nn.Module:
        return grouped(*tensors, operations=operations)

    x = rows_of(shape[1], dtype)
    check(on_chips(make, placed, x), x, weight)


@pytest.mark.parametrize("splits_inputs", [False, True])
def test_int8_activations_on_chips(splits_inputs: bool) -> None:
    weight = Weight(8, 512, None)
    parts, x = CHIPS if splits_inputs else 1, rows_of(512, torch.float32)
    on_host = of_integers(weight.values, weight.scale[:, 0], Operations(chips=parts))
    operations = Operations(integer_product=product_in_int32, chips=parts)

    def make(values: torch.Tensor, scale: torch.Tensor) -> nn.Module:
        return of_integers(values, scale, operations)

    placed = [(weight.values, 1 if splits_inputs else 0), (weight.scale[:, 0], None if splits_inputs else 0)]
    assert torch.allclose(on_chips(make, placed, x), on_host(x), rtol=1e-5, atol=1e-4)


KEPT = Operations(kept_in_shape=kept_in_shape)


@pytest.mark.parametrize(("operations", "writes"), [(TORCH, True), (KEPT, False)])
def test_a_tpu_writes_no_dequantized_weight(operations: Operations, writes: bool) -> None:
    """Where the result is cut into heads."""
    out, inputs, tracer = 1408, 1024, Tracer()
    values = tracer.placeholder((inputs // 64, 64, out), torch.int4, None)
    scale = tracer.placeholder((inputs // 64, out), torch.float32, None)
    linear = grouped(values, scale, operations=operations)

    def function(x: torch.Tensor, caches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        heads = linear(x).unflatten(-1, (-1, 32))
        return [(heads * heads.cos()).sum(2)], [caches[0] + 1]

    with torch.no_grad():
        graph = tracer.trace(function, [TracedTensor((2, 1, inputs), torch.bfloat16, None), CACHE], donates=1).graph
    module = parse_module(TPUCompiler(find_slice("v5e-4")).compile(graph).text)
    floats = [each for each in module.entry.instructions.values() if each.results[0].dtype == "bf16"]
    assert (max(each.nbytes for each in floats) >= 2 * out * inputs) == writes
