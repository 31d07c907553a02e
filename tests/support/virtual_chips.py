"""Virtual chips in the test's own process, and XLA told to compile quickly for them.

A process starts XLA once, with a number of chips that stays; a session takes the first ones of them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from runtime.devices import pjrt
from runtime.devices.tracing import TracedGraph

MOST = 8  # chips of any session that a test opens in its own process
# LLVM's optimizations take most of the time of compiling for the CPU, and MLIR's passes over every fusion most of the
# rest. The HLO that XLA optimizes comes out the same without them.
QUICK_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# The same for the environment of a process that compiles for the CPU alone: libtpu ends one for flags it doesn't know.
QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK_OPTIONS.items())


def start() -> None:
    """Start XLA with as many virtual chips as any test of this process may need."""
    pjrt.start("cpu", MOST)


@contextmanager
def graphs_given_to_xla() -> Iterator[list[TracedGraph]]:
    """The graphs that are compiled within this context, in a list that grows."""
    given: list[TracedGraph] = []
    compile_ = pjrt.Mesh.compile

    def compile_noted(self: pjrt.Mesh, graph: TracedGraph, options: Mapping[str, Any] | None = None) -> pjrt.Program:
        given.append(graph)
        return compile_(self, graph, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pjrt.Mesh, "compile", compile_noted)
        yield given


def stablehlo_text(graph: TracedGraph) -> str:
    """What is given to the compiler, as jax writes it down."""
    start()
    return pjrt._exported(graph, "cpu").mlir_module()


@contextmanager
def quickly_compiled() -> Iterator[None]:
    """Programs for virtual chips that are compiled within this context are so quickly, and run slowly."""
    compile_ = pjrt.Mesh.compile

    def compile_quickly(self: pjrt.Mesh, graph: TracedGraph, options: Mapping[str, Any] | None = None) -> pjrt.Program:
        if self.platform != "cpu":
            return compile_(self, graph, options)
        return compile_(self, graph, dict(options or {}) | QUICK_OPTIONS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pjrt.Mesh, "compile", compile_quickly)
        yield


def forget_programs() -> None:
    """Free what jax keeps of the programs compiled since the last time: several MB for every session."""
    if "jax" in sys.modules and pjrt.compilations() != _forgotten[0]:
        gc.collect()
        sys.modules["jax"].clear_caches()
        _forgotten[0] = pjrt.compilations()


_forgotten = [0]  # the number of programs compiled so far, at the last time
