"""Whether an output fits (disk, inodes, memory) and how long it may take, found out before its first byte."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TypeVar

from converters.console.errors import InputError
from converters.console.notes import note
from converters.console.units import format_bytes, format_seconds
from converters.files.file_system import sync_file
from converters.files.parallel import AHEAD, WORKERS, in_order
from converters.files.row_blocks import BLOCK_ELEMENTS
from converters.files.streams import chunk_bytes
from converters.model.config import ModelConfig

_PROGRAM_BYTES = 550_000_000  # the interpreter with torch
_BLOCK_BYTES = 10 * BLOCK_ELEMENTS  # a block as read (float32 at most), and what is made from it
_PROBE_BYTES = 64 << 20
_PROBE_TASKS = 24
_UNKNOWN_BYTES = 1 << 62  # more than any disk holds
T = TypeVar("T")


def room_for(nbytes: int) -> int:
    """Bytes that must be free for weights of ``nbytes``, with the small files and the file system's own overhead."""
    return nbytes + nbytes // 1000 + (64 << 10)


def existing(path: Path) -> Path:
    """The nearest existing folder (or file) at or above ``path``, which is on the same disk."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Free bytes on the disk where ``path`` is or will be; without limit, with a note, where that isn't known."""
    usage = shutil.disk_usage(existing(path))
    if usage.free or usage.total:
        return usage.free
    note("The file system doesn't say how much room it has, so that was not checked.")  # FUSE without statfs
    return _UNKNOWN_BYTES


def expected_rss_bytes(at_once: int) -> int:
    """The resident memory in bytes that conversion and quantization need, which doesn't depend on the model's size.

    ``at_once`` is the number of files that are written at the same time.
    """
    return _PROGRAM_BYTES + (AHEAD + WORKERS + 1) * _BLOCK_BYTES + 2 * at_once * chunk_bytes(at_once)


def check_machine(out: Path, files: int, at_once: int = 1) -> None:
    """Raise InputError where the disk of ``out`` has no room for ``files`` more names, or memory is short.

    ``at_once`` of the files are written at the same time.
    """
    status = os.statvfs(existing(out))
    if status.f_files and status.f_favail < files:
        raise InputError(
            f"{out} needs {files} files and its disk has room for {status.f_favail} more names. Remove some files "
            "there, or give --out on another disk."
        )
    available = available_memory()
    needed = expected_rss_bytes(at_once)
    if available is not None and available < needed:
        raise InputError(
            f"This takes about {format_bytes(needed)} of memory and {format_bytes(available)} are "
            "available. Close other programs."
        )


def layers_that_fit(config: ModelConfig, nbytes: Callable[[ModelConfig], int], free: int) -> str:
    """A hint for an error: how many layers of the model fit in ``free`` bytes; empty where none or all do.

    ``nbytes`` gives the size of a configuration's output.
    """
    counts = range(1, config.num_layers + 1)
    fitting = bisect_right(counts, free, key=lambda count: room_for(nbytes(config.cut(count))))
    return f", --layers {fitting} or fewer" if 0 < fitting < config.num_layers else ""


def estimate(
    out: Path, nbytes: int, tasks: Iterable[Callable[[], T]], size: Callable[[T], int], at_once: int = 1
) -> str:
    """For --dry-run: a line with the time and memory that an output of ``nbytes`` is expected to take.

    Measures the first few of the ``tasks`` that make the output, whose results have ``size`` bytes, and a short write
    to this disk; the slower of the two sets the pace. ``at_once`` files are written at the same time.
    """
    waiting = iter(tasks)
    for first in islice(waiting, 1):
        first()  # not measured: it includes what happens only once, like loading torch
    begin = time.perf_counter()
    made = sum(map(size, in_order(islice(waiting, _PROBE_TASKS))))
    making = made / (time.perf_counter() - begin) if made else math.inf
    writing = _measure_write_rate(out)
    return (
        f"  about {format_seconds(nbytes / min(making, writing))} (this disk takes {format_bytes(int(writing))}/s, "
        f"{format_bytes(round(min(making, 1e15)))}/s are made; both measured for a moment), "
        f"about {format_bytes(expected_rss_bytes(at_once))} of memory"
    )


def _measure_write_rate(out: Path) -> float:
    """Bytes per second that the disk of ``out`` takes, measured by writing and flushing an unnamed file of 64 MiB."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=existing(out), buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(_PROBE_BYTES // len(block)):
            file.write(block)
        sync_file(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - begin)


def available_memory() -> int | None:
    """Linux's own estimate of the bytes of memory that a program can use; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
