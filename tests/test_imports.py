"""Who imports whom, read from the code: stages and their rooms in one direction, no circles, one module a library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("converters", "quantize", "runtime")  # each may import those before it
ROOMS = {  # the folders of a stage: each may import those before it
    "converters": ("console", "files", "model", "formats", "tokenizers", "output", "sources", "exports"),
    "quantize": ("formats", "shards", "calibration"),
    "runtime": ("model", "devices", "run", "plan", "bench", "evaluate", "calibrate"),
}
FILES = sorted(path for stage in STAGES for path in (ROOT / stage).rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in FILES}


@cache
def _imports(name: str, at_start: bool) -> frozenset[str]:
    """The modules that a module imports: when it is loaded, or at any time (but for types)."""
    found: set[str] = set()
    for node in _import_nodes(ast.parse(MODULES[name].read_text(encoding="utf-8")), at_start):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {node.module}
    return frozenset(found)


def _import_nodes(node: ast.AST, at_start: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif not (at_start and isinstance(child, ast.FunctionDef)):
            yield from _import_nodes(child, at_start)


@pytest.mark.parametrize("name", MODULES)
def test_stages_are_imported_in_one_direction(name: str) -> None:
    stage = STAGES.index(name.split(".")[0])
    later = {other for other in _imports(name, at_start=False) if other.split(".")[0] in STAGES[stage + 1 :]}
    assert not later


def _room(name: str) -> str:
    """The folder that a module is in; empty for a module that is directly in its stage."""
    parts = MODULES[name].relative_to(ROOT).parts
    return parts[1] if len(parts) > 2 else ""


@pytest.mark.parametrize("stage", STAGES)
def test_every_room_has_its_place(stage: str) -> None:
    assert sorted(ROOMS[stage]) == sorted({_room(name) for name in MODULES if name.split(".")[0] == stage} - {""})


@pytest.mark.parametrize("name", [name for name in MODULES if _room(name)])
def test_rooms_are_imported_in_one_direction(name: str) -> None:
    """In converters no room imports a module outside the rooms either."""
    stage = name.split(".")[0]
    allowed = {*ROOMS[stage][: ROOMS[stage].index(_room(name)) + 1], *(() if stage == "converters" else ("",))}
    own = {other for other in _imports(name, at_start=False) & MODULES.keys() if other.split(".")[0] == stage}
    assert not {other for other in own if _room(other) not in allowed}


@pytest.mark.parametrize(
    ("library", "module"), [("torch_xla", "runtime.devices.tracing"), ("jax", "runtime.devices.pjrt")]
)
def test_an_unstable_library_has_one_module(library: str, module: str) -> None:
    names = {library, library + "lib"}
    users = {name for name in MODULES if {other.split(".")[0] for other in _imports(name, False)} & names}
    assert users == {module}


def test_no_circle() -> None:
    """Not even by imports inside functions."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in _imports(name, at_start=False) & MODULES.keys():
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
