"""Console commands run in this process, as their scripts run them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from models import snapshot

from converters.cli import command as convert
from converters.console.command import run
from quantize.cli import command as quantize

Fill = tuple[click.Command, tuple[object, ...]]  # a command, and the arguments for its input
SUPPORT = Path(__file__).parent  # where the programs are that tests start


class Result(NamedTuple):
    """What a command printed."""

    stdout: str
    stderr: str


def invoke(command: click.Command, *args: object, exit_code: int = 0) -> Result:
    """Run ``command`` with ``args`` (anything that str makes an argument of) and assert its exit status."""
    code, result = run_command(command, *args)
    assert code == exit_code, f"exit status {code}, not {exit_code}\n{result.stdout}{result.stderr}"
    return result


def invoke_error(command: click.Command, *args: object) -> str:
    """Run a command that must refuse what it was given; returns its one line on stderr."""
    return error_line(invoke(command, *args, exit_code=2))


def error_line(result: Result) -> str:
    """The one line that an error may print; asserts that it is the only one."""
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.endswith("\n")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.rstrip("\n")


def run_command(command: click.Command, *args: object) -> tuple[int | str | None, Result]:
    """Exit status and output, in streams as strict about encoding as a terminal's."""
    streams = [
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, newline="\n")
        for errors in ("strict", "backslashreplace")
    ]
    status: int | str | None = None
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            run(command, [str(arg) for arg in args])
        except SystemExit as end:
            status = end.code
    for stream in streams:
        stream.flush()
    return status, Result(*(stream.buffer.getvalue().decode() for stream in streams))


def notes(result: Result) -> list[str]:
    """The notes on stderr, without that on a tokenizer: most models of tests have none."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Note: ")]
    return [line.removeprefix("Note: ") for line in lines if "gives no tokenizer.json" not in line]


class Killed(BaseException):
    """Raised to simulate SIGKILL: after it only what Python unwinds still runs."""


def kill(command: click.Command, *args: object) -> None:
    """Run a command that a patch ends with ``Killed``."""
    assert "Error: Killed" in invoke(command, *args, exit_code=1).stderr


def _raise_killed(*_: object) -> None:
    raise Killed


def kill_at(
    owner: type, method: str, command: click.Command, *args: object, instead: Callable[..., None] = _raise_killed
) -> None:
    """Run a command that is killed where it calls ``owner.method``, or by ``instead``, which takes its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, instead)
        kill(command, *args)


def refuse(root: Path, command: click.Command, *args: object, says: Iterable[str] = ()) -> str:
    """A command that must refuse, name what is wrong (``says``) and leave everything below ``root`` as it was."""
    before = snapshot(root)
    line = invoke_error(command, *args)
    assert snapshot(root) == before
    for words in says:  # apart from the path of root, which pytest names after the test
        assert words.replace(str(root), "") in line.replace(str(root), "")
    return line


def refuse_source(root: Path, *says: str, source: str = "hf") -> None:
    """Neither llama-convert nor llama-quantize takes ``root``/``source``, nor do they write ``root``/out."""
    refuse(root, convert, "--source", root / source, "--out", root / "out", says=says)
    refuse(root, quantize, root / source, "--int8", "--out", root / "out", says=says)
