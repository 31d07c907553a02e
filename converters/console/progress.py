"""Progress of long work on stderr: a bar in a terminal, an occasional plain line in a log."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from converters.console.notes import print_notes
from converters.console.units import format_bytes, format_seconds

FIRST_LINE_S, NEXT_LINE_S = 10.0, 30.0  # so short work prints nothing in a log


class Advance(Protocol):
    """Called with the number of further bytes that are done, and the name of the tensor they belong to, if any."""

    def __call__(self, count: int, tensor: str = "") -> None: ...


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Advance]:
    """Show how much of ``total_bytes`` is done, with rate and time left; yields the function to report progress to.

    Prints waiting notes first.
    """
    print_notes()
    if not sys.stderr.isatty():
        yield _Lines(label, total_bytes, format_bytes).advance
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(label, total_bytes, DownloadColumn(), TransferSpeedColumn()) as advance:
        yield advance


@contextmanager
def counted(label: str, total: int) -> Iterator[Advance]:
    """``progress`` of ``total`` parts of equal work, in place of bytes."""
    print_notes()
    if not sys.stderr.isatty():
        yield _Lines(label, total, str, with_rate=False).advance
        return
    from rich.progress import MofNCompleteColumn

    with _bar(label, total, MofNCompleteColumn()) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int, *columns: Any) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)

        def advance(count: int, tensor: str = "") -> None:
            bar.update(task, advance=count, description=label + _layer(tensor))

        yield advance


@contextmanager
def spinner(label: str) -> Iterator[None]:
    """Show in a terminal that work of unknown length is going on."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(label):
        yield


def _layer(tensor: str) -> str:
    """`` layer 17`` of model.layers.17.mlp.up_proj.weight; nothing for a tensor outside the layers."""
    match = re.match(r"model\.(?:decoder\.)?layers\.(\d+)\.", tensor)
    return f" layer {match[1]}" if match else ""


class _Lines:
    """Progress in a log: lines with what is done, share, rate and time left."""

    def __init__(self, label: str, total: int, say: Callable[[int], str], with_rate: bool = True) -> None:
        """``say`` writes an amount down."""
        self._label, self._total, self._say, self._with_rate = label, total, say, with_rate
        self._done = 0
        self._begin = time.monotonic()
        self._next = self._begin + FIRST_LINE_S

    def advance(self, count: int, tensor: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + NEXT_LINE_S
        rate = self._done / (now - self._begin)
        left = format_seconds(max(0, self._total - self._done) / rate) if rate else "unknown"
        speed = f"{self._say(int(rate))}/s, " if self._with_rate else ""
        print(
            f"{self._label}{_layer(tensor)}: {self._say(self._done)} of {self._say(self._total)} "
            f"({self._done / max(1, self._total):.0%}), {speed}{left} left",
            file=sys.stderr,
            flush=True,
        )
