"""Commands started without stdin, stdout or stderr do their work, and print into nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from invoke import SUPPORT, invoke
from models import snapshot, write_hf

from converters.cli import command as convert
from quantize.cli import command as quantize

CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("streams")
    invoke(convert, "--source", write_hf(root / "hf"), "--out", root / "checkpoint")
    invoke(quantize, root / "checkpoint", "--int8", "--out", root / "shards")
    return root


def start(closed: tuple[str, ...], code: str, *arguments: object, says: str = "") -> subprocess.CompletedProcess[str]:
    """Python without some of its streams, as a shell starts it; asserts that all went well.

    ``says`` is what its stderr begins with; nothing else may be there where that is nothing.
    """
    script = 'exec "$@" ' + " ".join(CLOSED[name] for name in closed)
    line = ["sh", "-c", script, "sh", sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(says) if says else done.stderr == ""
    return done


def main_of(module: str) -> str:
    return f"from {module} import main; main()"


def test_convert_without_any(root: Path, tmp_path: Path) -> None:
    """Were a number free, the next file that is opened would get it."""
    arguments = ("--source", root / "hf", "--out", tmp_path / "out")
    start(("stdin", "stdout", "stderr"), main_of("converters.cli"), *arguments)
    assert snapshot(tmp_path / "out") == snapshot(root / "checkpoint")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_quantize(closed: str, root: Path, tmp_path: Path) -> None:
    arguments = (root / "checkpoint", "--int8", "--out", tmp_path / "out")
    start((closed,), main_of("quantize.cli"), *arguments)
    assert snapshot(tmp_path / "out") == snapshot(root / "shards")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_run(closed: str, root: Path, tmp_path: Path) -> None:
    arguments = ["--shards", root / "shards", "--backend", "eager", "--prompt-ids", "1,5", "--max-new-tokens", "2"]
    arguments += ["--max-seq-len", "16", "--buckets", "8", "--json", tmp_path / "figures"]
    says = "" if closed == "stderr" else "Note: Memory of this host: "
    done = start((closed,), main_of("runtime.cli"), *arguments, says=says)
    assert len(json.loads((tmp_path / "figures").read_bytes())["token_ids"][0]) == 2
    assert (done.stdout == "") == (closed == "stdout")


@pytest.mark.parametrize("closed", [(), *((name,) for name in CLOSED), tuple(CLOSED)])
def test_plan(closed: tuple[str, ...], tmp_path: Path) -> None:
    done = start(closed, main_of("runtime.plan_cli"), "--config", "tiny", "--json", tmp_path / "plan")
    assert json.loads((tmp_path / "plan").read_bytes())["model"] == "tiny"
    assert (done.stdout == "") == ("stdout" in closed)


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_bench(closed: str, root: Path, tmp_path: Path) -> None:
    """It says on stderr how each run went."""
    child = SUPPORT / "child_bench.py"
    code = f"import runpy; runpy.run_path({str(child)!r})"
    arguments = ("--shards", root / "shards", "--out", tmp_path / "out", "--figures", "3", "--batch-size", "1,2")
    sizes = ("--prompt-len", "3", "--max-seq-len", "24", "--max-new-tokens", "2", "--repeat", "1")
    done = start((closed,), code, tmp_path / "log", *arguments, *sizes, says="Run 1 of 2" * (closed == "stdout"))
    assert len((tmp_path / "out" / "runs.jsonl").read_bytes().splitlines()) == 3
    assert (done.stdout == "") == (closed == "stdout")


PROBE = """
import os, sys
from converters.console.standard_streams import prepare_standard_streams
streams = [sys.stdin, sys.stdout, sys.stderr]
prepare_standard_streams()
with open(sys.argv[1], "wb") as file:
    assert file.fileno() > 2
    os.write(1, b"printed below Python")
    os.write(2, b"printed below Python")
    assert os.system("echo printed by a child && echo printed by a child >&2") == 0
    print("printed")
    print("printed", file=sys.stderr)
    assert sys.stdin.read() == ""
    assert not any(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
"""


@pytest.mark.parametrize("closed", [("stdin", "stdout", "stderr"), ("stdout", "stderr")])
def test_no_file_gets_what_is_printed(closed: tuple[str, ...], tmp_path: Path) -> None:
    start(closed, PROBE, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""


def test_streams_that_are_there_are_left_alone() -> None:
    code = "from converters.console.standard_streams import prepare_standard_streams as p; p(); print(input())"
    done = subprocess.run([sys.executable, "-c", code], input="said\n", capture_output=True, text=True, check=True)
    assert done.stdout == "said\n"
