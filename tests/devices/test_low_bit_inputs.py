"""Programs of int4 and float8, dtypes that torch_xla lacks, wholly or for its placeholders.

Virtual chips hold int4 in int8; that a TPU's program takes int4 is seen in what its compiler makes of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import virtual_chips

from quantize.slices import find_slice
from runtime.devices import pjrt
from runtime.devices.tracing import Trace, TracedTensor, Tracer
from runtime.plan.hlo import parse_module
from runtime.plan.tpu_compiler import TPUCompiler

CHIPS = 4
OUT, INPUTS = 8, 12
CACHE = [TracedTensor((2,), torch.float32, None)]
DTYPES = [torch.int4, torch.float8_e4m3fn]


@pytest.fixture(scope="module")
def mesh() -> pjrt.Mesh:
    virtual_chips.start()
    return pjrt.Mesh(pjrt.start("cpu")[:CHIPS], "cpu")


def values(dtype: torch.dtype) -> torch.Tensor:
    """[OUT, INPUTS] with every value of int4, each in a byte of its own, as torch has them."""
    integers = torch.arange(OUT * INPUTS, dtype=torch.int8).view(OUT, INPUTS) % 16 - 8
    return integers.view(torch.int4) if dtype == torch.int4 else integers.to(dtype)


def place(mesh: pjrt.Mesh, tensor: torch.Tensor, axis: int | None) -> Any:
    parts = [tensor] * CHIPS if axis is None else list(tensor.split(tensor.shape[axis] // CHIPS, axis))
    return mesh.place(parts, axis)


def product(dtype: torch.dtype, axis: int | None, stands_for: Any = None) -> Trace:
    """x [2, INPUTS] -> x W^T, for a weight [OUT, INPUTS] of ``dtype`` that the function holds."""
    tracer = Tracer()
    weight = tracer.placeholder((OUT, INPUTS), dtype, axis, stands_for)

    def function(x: torch.Tensor, caches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [x @ weight.to(x.dtype).T], [caches[0] + 1]

    return tracer.trace(function, [TracedTensor((2, INPUTS), torch.float32, None), CACHE], donates=1)


def given(mesh: pjrt.Mesh, traced: Trace, x: torch.Tensor) -> list[Any]:
    arrays = [place(mesh, each, None) for each in (x, torch.zeros(2))]
    inputs = [traced.held.get(index) for index in range(len(traced.graph.inputs))]
    for index, argument in traced.arguments.items():
        inputs[index] = arrays[argument]
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_weight(dtype: torch.dtype, axis: int | None, mesh: pjrt.Mesh) -> None:
    weight = values(dtype)
    traced = product(dtype, axis, place(mesh, weight, axis))
    assert TracedTensor((OUT, INPUTS), dtype, axis) in traced.graph.inputs
    x = torch.arange(2 * INPUTS).view(2, INPUTS).float()
    y = pjrt.to_host(mesh.compile(traced.graph)(given(mesh, traced, x))[0])
    exact = weight.view(torch.int8) if dtype == torch.int4 else weight
    assert torch.equal(y, x @ exact.float().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_argument(dtype: torch.dtype, mesh: pjrt.Mesh) -> None:
    def function(x: torch.Tensor, caches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [x.float() * 3], [caches[0] + 1]

    argument = TracedTensor((OUT, INPUTS), dtype, None)
    traced = Tracer().trace(function, [argument, CACHE], donates=1)
    assert argument in traced.graph.inputs
    y = pjrt.to_host(mesh.compile(traced.graph)(given(mesh, traced, values(dtype)))[0])
    exact = values(dtype).view(torch.int8) if dtype == torch.int4 else values(dtype)
    assert torch.equal(y, exact.float() * 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_placed(dtype: torch.dtype, axis: int | None, mesh: pjrt.Mesh) -> None:
    """Parts of a tensor's columns are not contiguous, and torch copies no int4."""
    held = torch.int8 if dtype == torch.int4 else dtype
    array = place(mesh, values(dtype), axis)
    assert pjrt.describe(array) == TracedTensor((OUT, INPUTS), held, axis)
    assert np.asarray(array).astype(int).tolist() == values(dtype).view(torch.int8).tolist() or dtype != torch.int4
    assert pjrt.describe(mesh.zeros((OUT, INPUTS), dtype, axis)) == TracedTensor((OUT, INPUTS), held, axis)


def test_int4_as_numpy_has_it() -> None:
    for tensor in (values(torch.int4), values(torch.int4)[:, 1:5], values(torch.int4).T):
        found = pjrt._to_numpy(tensor)
        assert found.dtype.name == "int4"
        assert found.astype(int).tolist() == tensor.view(torch.int8).tolist()


def test_a_tpu_takes_int4(tmp_path: Path) -> None:
    """Also by way of the compile cache, where int8's program of the same trace is."""
    compiler = TPUCompiler(find_slice("v5e-4"), tmp_path)
    graphs = [product(dtype, 0).graph for dtype in (torch.int8, torch.int4, torch.float8_e4m3fn)]
    assert graphs[0].fingerprint == graphs[1].fingerprint
    for graph, name in zip(graphs, ("s8", "s4", "f8e4m3fn"), strict=True):
        inputs = parse_module(compiler.compile(graph).text).entry.parameters.values()
        assert sorted(each.results[0].dtype for each in inputs) == sorted(["f32", "f32", name])
    assert tuple(compiler.cache_use) == (0, 3, 0)
