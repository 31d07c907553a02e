"""One run of one point in a separate process, so that memory and compilations are counted for it alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import runtime
from converters.console.command import TRACEBACK_VARIABLE, wants_traceback
from runtime.bench.journal import are_figures
from runtime.bench.points import Point

# The prctl(2) option by which the kernel kills a process when the thread that started it ends.
_PR_SET_PDEATHSIG = 1
_LONG = ("token_ids", "text")  # dropped: too long, and not figures


class RunFailed(Exception):
    """A run gave no figures; the message is the reason, in one line."""


@dataclass(frozen=True)
class Runner:
    """Starts the runs. ``shards`` are directories by format, ``layers`` is how many layers to run (None: all), and
    ``cache`` is the folder that keeps compiled graphs for later runs.
    """

    shards: dict[str, Path]
    layers: int | None
    cache: Path

    def measure(self, point: Point) -> dict[str, Any]:
        """Run the ``point``; returns it with the process's ``wall_s`` and its ``figures``, or an ``error`` instead."""
        begin = time.monotonic()
        module = "runtime.bench.baseline" if point.is_baseline else "runtime.cli"
        try:
            outcome: dict[str, Any] = {"figures": self._figures(module, self.arguments(point))}
        except RunFailed as failure:
            outcome = {"error": str(failure)}
        return {"point": point.to_json(), "wall_s": time.monotonic() - begin} | outcome

    def arguments(self, point: Point) -> list[str]:
        """The command-line arguments for llama-run or the baseline's process."""
        options: dict[str, Any] = {
            "--shards": self.shards[point.weights].absolute(),
            "--prompt-len": point.prompt_len,
            "--max-new-tokens": point.new_tokens,
            "--batch-size": point.batch_size,
            "--dtype": point.dtype,
            "--backend": point.backend,
        }
        if self.layers is not None:
            options["--layers"] = self.layers
        if not point.is_baseline:
            options |= {
                "--max-seq-len": point.max_seq_len,
                "--buckets": ",".join(map(str, point.buckets())),
                "--json": "-",
            }
            if point.backend != "eager":  # which compiles nothing
                options["--compile-cache"] = self.cache.absolute()
        return [str(part) for option in options.items() for part in option]

    def _figures(self, module: str, arguments: Sequence[str]) -> dict[str, Any]:
        done = _call(module, arguments)
        if done.returncode:
            if wants_traceback():
                click.echo(done.stderr, err=True, nl=False)
            raise RunFailed(_reason(done))
        try:
            figures = json.loads(done.stdout)
        except ValueError:
            figures = None
        if not are_figures(figures):
            raise RunFailed(f"no figures on stdout: {done.stdout[:100]!r}")
        return {key: value for key, value in figures.items() if key not in _LONG}


def end_with_parent() -> None:
    """Have this process killed when its parent ends, so that no orphan disturbs a rerun's figures (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _call(module: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run ``main`` of a module of this copy of the package, in a process that ends with this one."""
    code = f"from runtime.bench.child import end_with_parent; end_with_parent(); from {module} import main; main()"
    root = str(Path(runtime.__file__).parent.parent)
    traceback = {TRACEBACK_VARIABLE: "1"} if wants_traceback() else {}
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=root,  # -c puts the current directory first on the path
        env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"} | traceback,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed: its last line on stderr, or how it ended."""
    if done.returncode < 0:
        return f"ended by signal {_signal_name(-done.returncode)}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return (lines[-1].removeprefix("Error: ") if lines else f"exit status {done.returncode}")[:300]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)
