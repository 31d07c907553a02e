"""The compile cache: found again by another start, never in place of another program, never from somebody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke, invoke_error
from models import write_hf

from converters.console import notes
from converters.console.errors import InputError, shown
from quantize.cli import command as quantize
from runtime.cli import command as run
from runtime.devices import compile_cache, pjrt
from runtime.devices.compile_cache import CompileCache, check_folder
from runtime.devices.tracing import Trace, TracedTensor, Tracer
from runtime.plan_cli import command as plan

ROWS = 4
CACHE = [TracedTensor((2, 3), torch.float32, None)]


@pytest.fixture(scope="module")
def chips() -> list[Any]:
    return pjrt.start("cpu", 4)


@pytest.fixture
def mesh(chips: list[Any]) -> pjrt.Mesh:
    return pjrt.Mesh(chips[:1], "cpu")


@pytest.fixture(autouse=True)
def _own_notes() -> Iterator[None]:
    notes.forget_notes()
    yield
    notes.forget_notes()


def trace(factor: float = 2.0, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Trace:
    """x, caches -> x * factor, caches + 1."""

    def function(x: torch.Tensor, caches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [x * factor], [caches[0] + 1]

    return Tracer().trace(function, [TracedTensor((rows,), dtype, None), CACHE], donates=1)


def use(folder: Path, mesh: pjrt.Mesh, traced: Trace | None = None, options: Any = None) -> tuple[int, int, int]:
    """Start with the cache and run the program, whose results must be right; returns how it was got."""
    traced, cache = traced or trace(), CompileCache(folder, mesh, options)
    program = cache.program(traced.graph, "doubled")
    given = [torch.arange(ROWS, dtype=torch.float32), torch.ones(2, 3)]
    inputs: list[Any] = [None] * len(traced.graph.inputs)
    for index, place in traced.arguments.items():
        inputs[index] = mesh.place([given[place].clone()], None)
    doubled, grown = map(pjrt.to_host, program(inputs))
    assert doubled.tolist() == [0, 2, 4, 6]
    assert (grown == 2).all()
    return tuple(cache.use)


def the_file(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


def test_found_again(tmp_path: Path, mesh: pjrt.Mesh) -> None:
    assert use(tmp_path / "cache", mesh) == (0, 1, 0)
    before = the_file(tmp_path / "cache").read_bytes()
    assert use(tmp_path / "cache", mesh) == (1, 0, 0)
    assert the_file(tmp_path / "cache").read_bytes() == before
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert the_file(tmp_path / "cache").stat().st_mode & 0o777 == 0o600
    assert not notes._noted


def _flip(place: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[place] ^= 1
        return bytes(changed)

    return change


def _refused(content: bytes) -> bytes:
    """A whole file with a program that is none."""
    kept = compile_cache._parsed(memoryview(content)[compile_cache._HEAD.size :], None)
    return compile_cache._content(compile_cache.Kept(kept.description, b"no program", b""))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_flip(-1), "bytes have changed"),
        (_flip(70), "bytes have changed"),  # in the description
        (_flip(40), "bytes have changed"),  # in the digest
        (_flip(19), "format is"),
        (lambda content: content[:-1], "bytes)"),
        (lambda content: content[:20], "cut off"),
        (lambda content: content + b"\0", "bytes)"),
        (_refused, "can't be loaded"),
    ],
)
def test_damaged_is_compiled_anew_and_replaced(
    change: Callable[[bytes], bytes], why: str, tmp_path: Path, mesh: pjrt.Mesh
) -> None:
    use(tmp_path, mesh)
    path = the_file(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    assert use(tmp_path, mesh) == (0, 0, 1)
    [said] = notes._noted
    assert f"{path} can't be loaded" in said
    assert why in said
    assert "compiled anew" in said
    assert use(tmp_path, mesh) == (1, 0, 0)


def _text(path: Path, other: Path) -> None:
    path.write_text("a diary\n")


def _link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def _folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def _another_program(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("make", [_text, _link, _folder, _another_program])
def test_what_is_not_ours_is_left_alone(make: Callable[[Path, Path], None], tmp_path: Path, mesh: pjrt.Mesh) -> None:
    folder = tmp_path / "cache"
    use(folder, mesh)
    CompileCache(tmp_path / "other", mesh).program(trace(3.0).graph, "tripled")
    make(the_file(folder), the_file(tmp_path / "other"))
    before = the_file(folder).lstat()
    assert use(folder, mesh) == (0, 0, 1)
    [said] = notes._noted
    assert "left as it is" in said
    after = the_file(folder).lstat()
    assert (before.st_ino, before.st_mtime_ns, before.st_mode) == (after.st_ino, after.st_mtime_ns, after.st_mode)


def test_a_full_disk_costs_only_the_file(tmp_path: Path, mesh: pjrt.Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert use(tmp_path, mesh) == (0, 1, 0)
    [said] = notes._noted
    assert "could not be kept" in said
    assert "No space left on device" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def user_folder() -> Iterator[Path]:
    """A folder of a user who is not root, whom this process is meanwhile."""
    user = os.geteuid() or 4321
    with tempfile.TemporaryDirectory() as path:
        os.chown(path, user, -1)
        before = os.geteuid()
        os.seteuid(user)
        yield Path(path)
        os.chmod(path, 0o700)
        os.seteuid(before)


def test_a_folder_for_reading_only(user_folder: Path, mesh: pjrt.Mesh) -> None:
    use(user_folder, mesh)
    user_folder.chmod(0o500)
    assert use(user_folder, mesh) == (1, 0, 0)
    assert use(user_folder, mesh, options={"xla_cpu_prefer_vector_width": 128}) == (0, 1, 0)
    assert any("could not be kept" in said for said in notes._noted)


def test_every_difference_is_another_key(tmp_path: Path, chips: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = pjrt.Mesh(chips[:1], "cpu")

    def key(traced: Trace, mesh: pjrt.Mesh = mesh, options: Any = None) -> str:
        return CompileCache(tmp_path, mesh, options)._key(traced.graph)

    keys = [key(trace()), key(trace(3.0)), key(trace(rows=5)), key(trace(dtype=torch.bfloat16))]
    keys += [key(trace(), options={"xla_cpu_prefer_vector_width": 128}), key(trace(), pjrt.Mesh(chips[:2], "cpu"))]
    keys += [key(trace(), pjrt.Mesh(chips[1::-1], "cpu"))]
    with monkeypatch.context() as patch:
        patch.setenv("NPROC", "77")
        keys.append(key(trace()))
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        with monkeypatch.context() as patch:
            patch.setattr(pjrt, "environment", lambda name=variable: {name: ["--xla_of_old=1"]})
            keys.append(key(trace()))
    with monkeypatch.context() as patch:
        patch.setattr(pjrt, "versions", lambda: {"jaxlib": "0"})
        keys.append(key(trace()))
    with monkeypatch.context() as patch:
        patch.setattr(compile_cache, "_processor", lambda: "another")
        keys.append(key(trace()))
    assert len(set(keys)) == len(keys) == 12
    assert key(trace()) == keys[0]


OPERANDS = {
    "index_copy, rows": lambda x, y: x.index_copy(0, torch.tensor([1, 0], device=x.device), y),
    "index_copy, columns": lambda x, y: x.index_copy(1, torch.tensor([1, 0], device=x.device), y),
    "smaller": lambda x, y: torch.where(x < y, x, y),
    "larger": lambda x, y: torch.where(x < y, y, x),
    "rows": lambda x, y: x.softmax(0) + y,
    "columns": lambda x, y: x.softmax(1) + y,
}


def test_a_fingerprint_tells_operands_and_axes() -> None:
    """torch_xla's own hash does not."""
    kind = TracedTensor((2, 2), torch.float32, None)

    def fingerprint(function: Callable[..., torch.Tensor], exact: bool = False) -> str:
        def both(x: torch.Tensor, y: torch.Tensor, caches: list[torch.Tensor]) -> Any:
            return [function(x, y)], [caches[0] + 1]

        return Tracer().trace(both, [kind, kind, CACHE], donates=2, exact=exact).graph.fingerprint

    found = [fingerprint(function) for function in OPERANDS.values()]
    assert len(set(found)) == len(OPERANDS)
    assert fingerprint(torch.matmul) != fingerprint(torch.matmul, exact=True)
    assert found == [fingerprint(function) for function in OPERANDS.values()]


def test_what_differs_is_said(tmp_path: Path, mesh: pjrt.Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    use(tmp_path, mesh)
    before = pjrt.versions()
    monkeypatch.setattr(pjrt, "versions", lambda: {"jaxlib": "0"})
    assert use(tmp_path, mesh) == (0, 1, 0)
    [said] = notes._noted
    assert f"versions: {shown(before)}, now {{'jaxlib': '0'}}" in said
    assert "environment" not in said
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
@pytest.mark.parametrize("backend", ["xla", "inductor"])
def test_a_folder_that_others_write_to(mode: int, backend: str, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    line = invoke_error(run, "--shards", shards, "--backend", backend, "--compile-cache", folder)
    assert f"chmod go-w {folder}" in line


def test_a_plan_checks_the_folder_too(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    line = invoke_error(plan, "--config", "tiny", "--target", "v4-8", "--compile", "--compile-cache", tmp_path)
    assert f"chmod go-w {tmp_path}" in line
    line = invoke_error(plan, "--config", "tiny", "--target", "v4-8", "--compile-cache", tmp_path)
    assert "give --compile" in line


def test_a_program_that_others_write_to(tmp_path: Path, mesh: pjrt.Mesh) -> None:
    use(tmp_path, mesh)
    the_file(tmp_path).chmod(0o660)
    with pytest.raises(InputError, match=f"chmod go-w {the_file(tmp_path)}"):
        check_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_somebody_elses(tmp_path: Path, mesh: pjrt.Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    use(tmp_path, mesh)
    os.chown(the_file(tmp_path), 4321, 4321)
    with pytest.raises(InputError, match="belongs to another user"):
        check_folder(tmp_path)
    os.chown(the_file(tmp_path), 0, 0)
    os.chown(tmp_path, 4321, 4321)
    with pytest.raises(InputError, match="belongs to another user"):
        CompileCache(tmp_path, mesh)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)  # root's files are taken from a folder of one's own
    assert use(tmp_path, mesh) == (1, 0, 0)


_UNTRACED = "from runtime.devices.tracing import Tracer; Tracer.trace = None; "  # any trace is an error


def _start(shards: Path, backend: str, cache: Path, *more: str, before: str = "") -> dict[str, Any]:
    """Figures of llama-run in a process of its own, which runs ``before`` first."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    line = [sys.executable, "-c", f"{before}from runtime.cli import main; main()", "--shards", str(shards)]
    line += ["--backend", backend, "--prompt-ids", "3,4,5", "--max-new-tokens", "3", "--buckets", "8"]
    line += ["--max-seq-len", "16", "--compile-cache", str(cache), "--json", "-", *more]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    invoke(quantize, write_hf(root / "hf"), "--int8", "--out", root / "out")
    return root / "out"


@pytest.mark.slow
def test_inductor_loads_on_the_second_start(shards: Path, tmp_path: Path) -> None:
    first, second = (_start(shards, "inductor", tmp_path / "cache") for _ in range(2))
    assert first["compile_cache"] == {"hits": 0, "misses": 2, "failures": 0}  # a bucket and the decode step
    assert second["compile_cache"] == {"hits": 2, "misses": 0, "failures": 0}
    assert first["token_ids"] == second["token_ids"]
    assert first["recompilations"] == second["recompilations"] == 0


@pytest.mark.slow
def test_xla_loads_on_the_second_start(shards: Path, tmp_path: Path) -> None:
    """On 1 and on 4 chips, from one folder, without a trace; another batch size is another program."""
    invoke(quantize, shards.parent / "hf", "--int8", "--chips", 4, "--out", tmp_path / "out4")
    for made, chips in ((shards, 1), (tmp_path / "out4", 4)):
        first = _start(made, "xla", tmp_path / "cache")
        second = _start(made, "xla", tmp_path / "cache", before=_UNTRACED)
        assert first["chips"] == chips
        assert first["compile_cache"] == {"hits": 0, "misses": 2, "failures": 0}
        assert second["compile_cache"] == {"hits": 2, "misses": 0, "failures": 0}
        assert first["token_ids"] == second["token_ids"]
        assert first["recompilations"] == second["recompilations"] == 0
    other = _start(shards, "xla", tmp_path / "cache", "--batch-size", "2")
    assert other["compile_cache"] == {"hits": 0, "misses": 2, "failures": 0}
    assert len(list((tmp_path / "cache").glob("*.program"))) == 6
    assert len(list((tmp_path / "cache").glob("*.recipes"))) == 3


@pytest.mark.slow
def test_a_plan_finds_what_it_compiled(tmp_path: Path) -> None:
    """Programs for a v4-8, with the same figures as those of the start that compiled them, and as without a cache."""
    line = ["--config", "tiny", "--int8", "--target", "v4-8", "--compile", "--buckets", "128"]
    results = [invoke(plan, *line, "--json", tmp_path / "without.json")]
    for number in range(2):
        given = ["--compile-cache", tmp_path / "cache", "--json", tmp_path / f"{number}.json"]
        results.append(invoke(plan, *line, *given))
    assert results[1].stdout.endswith("compile cache: 0 programs found, 3 new\n")
    assert results[2].stdout.endswith("compile cache: 3 programs found, 0 new\n")
    without, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text())["compiled"] for name in ("without", "0", "1")
    )
    assert first.pop("compile_cache") == {"hits": 0, "misses": 3, "failures": 0}
    assert second.pop("compile_cache") == {"hits": 3, "misses": 0, "failures": 0}
    assert first == second
    for verdict in (without, first):
        for graph in (verdict, verdict["later_section"], *verdict["buckets"].values()):
            graph.pop("compile_s")
    assert without == first


def test_eager_has_nothing_to_keep(shards: Path, tmp_path: Path) -> None:
    message = invoke_error(run, "--shards", shards, "--backend", "eager", "--compile-cache", tmp_path / "cache")
    assert "compiles nothing" in message
    assert not (tmp_path / "cache").exists()
