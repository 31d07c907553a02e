"""What pjrt.py relies on beyond jax's documentation: a failure names the interface that another jax has moved.

The programs are jax's own, so torch_xla has no part in this.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from jax import export
from jax.experimental import serialize_executable

from runtime.devices import pjrt
from runtime.devices.tracing import TracedGraph, TracedTensor

CHIPS, SIZE = 2, 6


@pytest.fixture(scope="module", autouse=True)
def mesh() -> pjrt.Mesh:
    """First of all: jax has the virtual devices that it starts with."""
    return pjrt.Mesh(pjrt.start("cpu", 8)[:CHIPS], "cpu")


def function(factor: Any, first: Any, second: Any) -> list[Any]:
    """A sum over the chips, and both matrices changed in different ways, the second before the first."""
    return [(first + second).sum(), second * factor, first + factor]


@pytest.fixture(scope="module")
def graph(mesh: pjrt.Mesh) -> TracedGraph:
    """``function`` as tracing.py gives one: its last two results replace the third input and the second."""
    number, matrix = TracedTensor((), torch.float32, None), TracedTensor((CHIPS, SIZE), torch.float32, 0)
    shapes = [jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in (number, matrix, matrix)]
    module = export.export(jax.jit(function), platforms=["cpu"])(*shapes).mlir_module_serialized
    tensors = (number, matrix, matrix)
    return TracedGraph("function", tensors, tensors, (2, 1), {0: torch.tensor(3.0)}, lambda: module)


def matrices() -> list[torch.Tensor]:
    return [torch.arange(CHIPS * SIZE).view(CHIPS, SIZE).float() + start for start in (1, 100)]


def inputs(mesh: pjrt.Mesh) -> list[Any]:
    """As the graph has them. What a chip holds is copied: a CPU's array may lie in the tensor's own memory."""
    return [None, *(mesh.place([row[None].clone() for row in matrix], 0) for matrix in matrices())]


def check_results(results: list[Any]) -> None:
    for found, expected in zip(results, function(3.0, *matrices()), strict=True):
        assert torch.equal(torch.tensor(jax.device_get(found)), expected)


def test_an_exported_function_runs_the_module_that_it_holds() -> None:
    """By the field mlir_module_serialized of jax.export.Exported, a dataclass."""
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    doubled, negated = (
        export.export(jax.jit(each), platforms=["cpu"])(shape) for each in (lambda x: 2 * x, lambda x: -x)
    )
    assert dataclasses.is_dataclass(doubled), "jax.export.Exported is no dataclass any more"
    names = {field.name for field in dataclasses.fields(doubled)}
    assert "mlir_module_serialized" in names, f"jax.export.Exported has lost mlir_module_serialized: {sorted(names)}"
    replaced = dataclasses.replace(doubled, mlir_module_serialized=negated.mlir_module_serialized)
    assert jax.jit(replaced.call)(jnp.ones(3, jnp.float32)).tolist() == [-1, -1, -1], (
        "Exported.call ignores mlir_module_serialized"
    )


def test_a_graph_runs(mesh: pjrt.Mesh, graph: TracedGraph) -> None:
    check_results(mesh.compile(graph)(inputs(mesh)))


def test_donated_inputs_are_written_over_in_the_order_of_the_results(mesh: pjrt.Mesh, graph: TracedGraph) -> None:
    """By jax.jit's donate_argnums, whose rule for inputs of the same kind is documented nowhere."""
    program = mesh.compile(graph)
    header = program.text.split("\n", 1)[0]
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}", header)
    assert [int(number) for _, number in pairs] == list(program.donated), f"parameters have other numbers: {header}"
    given = [None, *(mesh.zeros((CHIPS, SIZE), torch.float32, 0) for _ in range(2))]
    first, second = (place_of(each) for each in given[1:])
    results = program(given)
    places = [place_of(each) for each in results[1:]]
    assert places == [second, first], f"donate_argnums gives results other inputs than the order says: {header}"


def place_of(array: Any) -> int:
    return array.addressable_data(0).unsafe_buffer_pointer()


def test_memory_is_counted_for_one_chip(mesh: pjrt.Mesh, graph: TracedGraph) -> None:
    """By memory_analysis of a compiled program."""
    memory, matrix = mesh.compile(graph).memory, 4 * SIZE
    assert memory.argument_bytes == memory.alias_bytes == 2 * matrix
    assert 2 * matrix < memory.output_bytes < 3 * matrix + 64  # a number, and where the results are


def test_donated_inputs_are_used_up(mesh: pjrt.Mesh, graph: TracedGraph) -> None:
    given = inputs(mesh)
    mesh.compile(graph)(given)
    assert all(each.is_deleted() for each in given[1:]), "a compiled program keeps what donate_argnums names"


def test_compilations_are_heard_of(mesh: pjrt.Mesh, graph: TracedGraph) -> None:
    """By the name of an event of jax.monitoring, which jax doesn't publish."""
    events = set()
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.add(event))
    before = pjrt.compilations()
    program = mesh.compile(graph)
    assert pjrt.compilations() == before + 1, f"no event {pjrt._COMPILED} for a compiled program, but {sorted(events)}"
    program(inputs(mesh))
    assert pjrt.compilations() == before + 1, "calling a compiled program is counted as compiling one"


def test_a_serialized_program_has_three_parts_and_runs(mesh: pjrt.Mesh, graph: TracedGraph) -> None:
    """By jax.experimental.serialize_executable: bytes, and the structures of inputs and results."""
    program = mesh.compile(graph)
    parts = serialize_executable.serialize(program._compiled)
    assert len(parts) == 3, f"serialize_executable.serialize gives {len(parts)} parts; compiled programs kept are of 3"
    assert isinstance(parts[0], bytes), "serialize_executable.serialize doesn't begin with bytes"
    loaded = mesh.load(program.serialize(), graph.order, len(graph.donated))
    check_results(loaded(inputs(mesh)))
    given, _ = loaded._compiled.args_info
    shardings, _ = loaded._compiled.input_shardings
    assert [(each.shape, str(each.dtype)) for each in given] == [
        (graph.inputs[index].shape, str(graph.inputs[index].dtype).removeprefix("torch.")) for index in graph.order
    ], "args_info of a loaded program doesn't describe its inputs; Program.rehearse makes zeros by it"
    assert len(shardings) == len(given), "input_shardings of a loaded program aren't those of its inputs"


def test_zeros_are_made_on_the_chips(mesh: pjrt.Mesh) -> None:
    """By jnp.zeros with a sharding as its device."""
    zeros = mesh.zeros((CHIPS, SIZE), torch.bfloat16, 0)
    assert pjrt.describe(zeros) == TracedTensor((CHIPS, SIZE), torch.bfloat16, 0), "jnp.zeros(device=) doesn't split"
