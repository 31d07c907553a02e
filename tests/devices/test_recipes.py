"""Recipes: a session like an earlier one traces nothing and gives the same; whatever differs is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import virtual_chips
from invoke import invoke
from models import make_model

from converters.console import notes
from quantize.cli import command as quantize
from runtime.devices import pjrt, recipes
from runtime.devices.compile_cache import CompileCache
from runtime.devices.recipes import Recipes
from runtime.devices.tracing import TracedTensor, Tracer
from runtime.run.session import SessionOptions, _opened_for, open_session
from runtime.run.stored_model import open_model

SLOTS, BUCKETS = 24, (8, 16)
GRAPHS = 4  # two buckets, a later section, the decode step
PROMPT = list(range(3, 13))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    virtual_chips.start()
    root = tmp_path_factory.mktemp("recipes")
    make_model(root / "hf", heads=6, kv_heads=2, hidden=48, head_dim=16, vocab=131)
    for chips in (1, 4):
        invoke(quantize, root / "hf", "--int8", "--chips", chips, "--out", root / f"out{chips}")
    invoke(quantize, root / "hf", "--bf16", "--out", root / "bf16")
    return root


@pytest.fixture(autouse=True)
def _own_notes() -> Iterator[None]:
    notes.forget_notes()
    yield
    notes.forget_notes()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions that are traced, in a list that grows."""
    names: list[str] = []
    trace = Tracer.trace

    def listed(self: Tracer, function: Callable[..., Any], *args: Any) -> Any:
        names.append(function.__name__)
        return trace(self, function, *args)

    monkeypatch.setattr(Tracer, "trace", listed)
    return names


def generated(shards: Path, cache: Path, **options: Any) -> tuple[list[list[int]], tuple[int, int, int]]:
    """Tokens of a session, which must compile nothing after its warm-up, and its use of the cache."""
    fixed = {"max_seq_len": SLOTS, "buckets": BUCKETS}
    with virtual_chips.quickly_compiled(), open_session(shards, compile_cache=cache, **fixed | options) as session:
        session.warm_up()
        before = session.backend.compilations()
        found = session.generate([PROMPT] * session.options.batch_size, 6).token_ids
        assert session.backend.compilations() == before
        return found, tuple(session.backend.cache_use())


def said() -> list[str]:
    """The notes, but for the sessions' own of their memory."""
    return [line for line in notes._noted if not line.startswith("Memory")]


def the_recipes(cache: Path) -> Path:
    [path] = cache.glob("*.recipes")
    return path


@pytest.mark.parametrize("chips", [1, 4])
def test_a_session_like_an_earlier_one_traces_nothing(
    chips: int, folder: Path, tmp_path: Path, traced: list[str]
) -> None:
    first, use = generated(folder / f"out{chips}", tmp_path)
    assert (len(traced), use) == (GRAPHS, (0, GRAPHS, 0))
    assert the_recipes(tmp_path).stat().st_mode & 0o777 == 0o600
    written = the_recipes(tmp_path).read_bytes()
    second, use = generated(folder / f"out{chips}", tmp_path)
    assert (len(traced), use) == (GRAPHS, (GRAPHS, 0, 0))
    assert first == second == generated(folder / f"out{chips}", tmp_path / "other")[0]
    assert the_recipes(tmp_path).read_bytes() == written
    assert not said()


def test_any_other_session_is_traced(folder: Path, tmp_path: Path, traced: list[str]) -> None:
    """With its own programs, or with those that are there for the same graphs."""
    generated(folder / "out1", tmp_path)
    others = [("out4", {}), ("bf16", {}), ("out1", {"batch_size": 2}), ("out1", {"dtype": torch.float32})]
    for count, (name, options) in enumerate(others, start=2):
        found, use = generated(folder / name, tmp_path, **options)
        assert (len(traced), use) == (count * GRAPHS, (0, GRAPHS, 0))
        assert found == generated(folder / name, tmp_path / "other" / f"{count}", **options)[0]
        del traced[-GRAPHS:]
    _, use = generated(folder / "out1", tmp_path, buckets=(16,))
    assert use == (3, 0, 0)  # traced, and found by their graphs
    assert len(traced) == (len(others) + 1) * GRAPHS + 3


def test_every_difference_is_another_key(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chips = pjrt.start("cpu", virtual_chips.MOST)

    def key(session: str = "", options: Any = None, count: int = 1) -> str:
        cache = CompileCache(tmp_path, pjrt.Mesh(chips[:count], "cpu"), options)
        return cache._recipes(Recipes(cache, session)._key)[0].name

    keys = [key(), key("another"), key(options={"xla_cpu_prefer_vector_width": 128}), key(count=2)]
    differing = [
        (pjrt, "versions", {"jaxlib": "0"}),
        (pjrt, "environment", {"XLA_FLAGS": ["--xla_of_old=1"]}),
        (recipes, "_source", "another"),
        (recipes, "_environment", [["XLA_OF_OLD", "1"]]),
    ]
    for module, name, value in differing:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda value=value: value)
            keys.append(key())
    assert len(set(keys)) == len(keys) == 8
    assert key() == keys[0]


def test_a_session_says_all_that_its_graphs_follow_from(folder: Path) -> None:
    model, options = open_model(folder / "out1", SLOTS), SessionOptions()
    others = [
        (open_model(folder / "bf16", SLOTS), options),
        (open_model(folder / "out4", SLOTS), options),
        (replace(model, config=replace(model.config, norm_eps=2e-5)), options),
        (replace(model, config=model.config.cut(1)), options),
    ]
    changes = [{"dtype": torch.float32}, {"kv_cache_dtype": torch.int8}, {"batch_size": 2}, {"max_seq_len": SLOTS}]
    changes += [{"buckets": (8,)}, {"sampled": True}]
    others += [(model, replace(options, **change)) for change in changes]
    found = [_opened_for(*each) for each in [(model, options), *others]]
    assert len(set(found)) == len(found) == 11
    assert found[0] == _opened_for(open_model(folder / "out1", SLOTS), replace(options, compile_cache=Path("cache")))


def test_any_change_of_the_source_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").mkdir()
    first, second = tmp_path / "__init__.py", tmp_path / "part" / "module.py"
    monkeypatch.setattr(recipes, "_PACKAGES", (SimpleNamespace(__name__="package", __file__=str(first)),))

    def source() -> str:
        return recipes._source.__wrapped__()

    found = [source()]
    for write in (
        lambda: first.write_text(""),
        lambda: second.write_text("A = 1\n"),
        lambda: second.write_text("A = 2\n"),
        lambda: second.rename(second.with_name("other.py")),
    ):
        write()
        found.append(source())
    assert len(set(found)) == len(found)
    assert source() == found[-1]


def _flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "why"),
    [(_flipped, "bytes have changed"), (lambda content: content[:-1], "bytes)"), (lambda _: b"", "not")],
)
def test_damaged_recipes_are_not_used(
    change: Callable[[bytes], bytes], why: str, folder: Path, tmp_path: Path, traced: list[str]
) -> None:
    first, _ = generated(folder / "out1", tmp_path)
    path = the_recipes(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    ours = bool(path.stat().st_size)
    assert generated(folder / "out1", tmp_path) == (first, (GRAPHS, 0, 0))
    [line] = said()
    assert f"{path} can't be used" in line
    assert why in line
    assert len(traced) == 2 * GRAPHS
    assert generated(folder / "out1", tmp_path) == (first, (GRAPHS, 0, 0))
    assert len(traced) == (2 if ours else 3) * GRAPHS  # what isn't ours is left alone


def test_a_missing_program_is_made_again(folder: Path, tmp_path: Path, traced: list[str]) -> None:
    first, _ = generated(folder / "out1", tmp_path)
    sorted(tmp_path.glob("*.program"))[0].unlink()
    assert generated(folder / "out1", tmp_path) == (first, (GRAPHS - 1, 1, 0))
    assert len(traced) == GRAPHS + 1
    assert generated(folder / "out1", tmp_path) == (first, (GRAPHS, 0, 0))


def test_scores_after_a_warm_up(folder: Path, tmp_path: Path, traced: list[str]) -> None:
    """Both warm-ups' graphs are kept, and found by a session that warms up for both."""
    found = []
    for _ in range(2):
        with (
            virtual_chips.quickly_compiled(),
            open_session(folder / "out1", compile_cache=tmp_path, max_seq_len=SLOTS, buckets=BUCKETS) as session,
        ):
            session.warm_up()
            session.warm_up_scores()
            found.append(session.score([PROMPT]))
    assert torch.equal(*found)
    assert len(traced) == 2 * GRAPHS - 1


def test_a_rehearsal_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program runs once on zeros, unless these were many, and gives the same before and after."""
    mesh, tracer = pjrt.Mesh(pjrt.start("cpu", virtual_chips.MOST)[:2], "cpu"), Tracer()
    rows, whole = TracedTensor((4, 4), torch.float32, 0), TracedTensor((4, 4), torch.float32, None)

    def step(x: torch.Tensor, cache: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return x @ x, [cache[0] + x]

    trace = tracer.trace(step, [whole, [rows]], donates=1)
    program = mesh.compile(trace.graph)
    runs: list[int] = []
    compiled = program._compiled
    monkeypatch.setattr(program, "_compiled", _Counted(compiled, runs))

    def results() -> list[list[float]]:
        given = [mesh.place([torch.full((4, 4), 2.0)] * 2, None), mesh.place([torch.ones(2, 4)] * 2, 0)]
        return [
            pjrt.to_host(found).flatten().tolist() for found in program([given[trace.arguments[i]] for i in (0, 1)])
        ]

    before = results()
    program.rehearse()
    assert (results(), len(runs)) == (before, 3)
    monkeypatch.setattr(pjrt, "REHEARSED_BYTES", 95)  # the program takes 64 and 32 on each chip
    program.rehearse()
    assert len(runs) == 3


class _Counted:
    def __init__(self, compiled: Any, runs: list[int]) -> None:
        self._compiled, self._runs = compiled, runs

    def __call__(self, *inputs: Any) -> Any:
        self._runs.append(1)
        return self._compiled(*inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


def test_what_is_held_otherwise_is_traced(folder: Path, tmp_path: Path, traced: list[str]) -> None:
    """Tensors of other values than those that the program was given by their label."""
    first, _ = generated(folder / "out1", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.devices.xla.value_of", lambda tensor: "another")
        assert generated(folder / "out1", tmp_path) == (first, (GRAPHS, 0, 0))
    assert len(traced) == 2 * GRAPHS
