"""What an earlier start has found out about its graphs, so that the next one needs no trace: which program each became,
and what it takes.

A trace takes a third of a second for every graph, only to find the program that is there. A recipe names the program
and what each of its inputs is: an argument of the graph, or a tensor that the decoder holds, by its label. A session's
recipes are in one file, under a key of all that its graphs follow from: what the session was opened for, this package's
own source, and what programs depend on besides. What differs in any of them finds no recipes, and is traced.

So the programs are known before the weights are there: meanwhile a thread loads them, and runs each on zeros once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils import _pytree as pytree

import converters
import quantize
import runtime
from runtime.devices.compile_cache import CompileCache, digest

if TYPE_CHECKING:
    from runtime.devices.pjrt import Program
    from runtime.devices.tracing import Trace

_PACKAGES = (converters, quantize, runtime)
_VARIABLES = ("XLA_", "PT_", "TORCH")  # beginnings of those by which torch_xla or torch may trace otherwise


@dataclass(frozen=True)
class Recipe:
    """A graph's program and what it takes; made of what JSON has."""

    program: str  # the name of its file
    takes: Sequence[int | str | None]  # by the graph's inputs: an argument's place, a label, None for a constant
    order: Sequence[int]  # the graph's inputs as the program takes them
    donated: int  # how many of the last of these are donated
    structure: str  # of the function's results

    @classmethod
    def of(cls, trace: Trace, program: str) -> Recipe:
        """``trace.held`` must have the labels of what the function holds."""
        takes = [trace.arguments.get(index, trace.held.get(index)) for index in range(len(trace.graph.inputs))]
        structure = pytree.treespec_dumps(trace.structure)
        return cls(program, takes, trace.graph.order, len(trace.graph.donated), structure)


class Recipes:
    """The recipes of a session, whose programs a thread loads from the first moment on."""

    def __init__(self, programs: CompileCache, session: str) -> None:
        """``session`` says what it was opened for: all that its graphs follow from, beside the package's source."""
        self._programs = programs
        self._key = digest([session, _source(), _environment(), sys.version])
        found = programs.read_recipes(self._key)
        self._keeps = found is not None
        self._found = {graph: Recipe(**each) for graph, each in (found or {}).items()}
        self._new: dict[str, Recipe] = {}
        self._thread = ThreadPoolExecutor(1, "load programs")
        self._loading = {graph: self._thread.submit(self._load, recipe) for graph, recipe in self._found.items()}
        self._rehearsing: dict[str, Future[None]] = {}

    def rehearse(self) -> None:
        """Have the thread run the programs once it has loaded them, the last one first, as one that is asked for early
        needs no rehearsal. Before this, torch_xla must have been started: it sets environment variables, and no thread
        may read any meanwhile, as XLA:CPU does when it builds a kernel.
        """
        for graph, loading in reversed(self._loading.items()):
            self._rehearsing[graph] = self._thread.submit(lambda loading=loading: loading.result().rehearse())

    def find(self, graph: str, holds: Callable[[str], bool]) -> tuple[Recipe, Program] | None:
        """The recipe and the program of a graph, by what tells it from all others of the session.

        None where there is none, or what it takes is not held by its label, or its program can't be loaded: a trace
        will find out why.
        """
        recipe, loading = self._found.get(graph), self._loading.pop(graph, None)
        rehearsing = self._rehearsing.pop(graph, None)
        if recipe is None or not all(holds(take) for take in recipe.takes if isinstance(take, str)):
            return None
        try:
            if rehearsing and not rehearsing.cancel():  # it has begun
                rehearsing.result()
            program = loading.result() if loading else self._load(recipe)
        except Exception:
            return None
        self._programs.count_hit()
        return recipe, program

    def add(self, graph: str, recipe: Recipe) -> None:
        self._new[graph] = recipe

    def keep(self) -> None:
        """Write down what was added, for the next start, and load no more of what was not asked for so far."""
        self.close()
        if self._new and self._keeps:
            self._found |= self._new
            self._new = {}
            recipes = {graph: asdict(recipe) for graph, recipe in self._found.items()}
            self._programs.write_recipes(self._key, recipes)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._loading.clear()
        self._rehearsing.clear()

    def _load(self, recipe: Recipe) -> Program:
        return self._programs.load(recipe.program, recipe.order, recipe.donated)


@cache
def _source() -> str:
    """The digest of this package's source, from which follows what a graph of a given name computes."""
    files = []
    for package in _PACKAGES:
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            files.append([package.__name__, path.relative_to(folder).as_posix(), sha256(path.read_bytes()).hexdigest()])
    return digest(files)


@cache
def _environment() -> list[list[str]]:
    """As it is at the first start: torch_xla adds to it later."""
    return [[name, value] for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)]
