"""Whether an output fits, found out before its first byte: disk, inodes, memory; and how long it may take."""

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
_BLOCK_BYTES = 10 * BLOCK_ELEMENTS  # a block as it is read (float32 at most), and what is made of it
_PROBE_BYTES = 64 << 20
_PROBE_TASKS = 24
_UNKNOWN_BYTES = 1 << 62  # more than any disk holds
T = TypeVar("T")


def room_for(nbytes: int) -> int:
    """Bytes that must be free for weights of ``nbytes``, with the small files and what the file system takes."""
    return nbytes + nbytes // 1000 + (64 << 10)


def existing(path: Path) -> Path:
    """The folder on whose disk ``path`` is or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where ``path`` is or will be; no limit where its file system doesn't say."""
    usage = shutil.disk_usage(existing(path))
    if usage.free or usage.total:
        return usage.free
    note("The file system doesn't say how much room it has, so that was not checked.")  # FUSE without statfs
    return _UNKNOWN_BYTES


def expected_rss_bytes(at_once: int) -> int:
    """The resident memory that conversion and quantization are expected to reach: the same for a model of any size.

    ``at_once`` is how many files are written at the same time.
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
    """A hint for an error: the most layers of a model whose output of ``nbytes`` would fit, or nothing."""
    counts = range(1, config.num_layers + 1)
    fitting = bisect_right(counts, free, key=lambda count: room_for(nbytes(config.cut(count))))
    return f", --layers {fitting} or fewer" if 0 < fitting < config.num_layers else ""


def estimate(
    out: Path, nbytes: int, tasks: Iterable[Callable[[], T]], size: Callable[[T], int], at_once: int = 1
) -> str:
    """For --dry-run: the memory and the time that an output of ``nbytes`` is expected to take.

    The first few of the ``tasks`` that make the output, whose results have ``size`` bytes, and a short write to this
    disk are measured; the slower of the two sets the pace.
    """
    waiting = iter(tasks)
    for first in islice(waiting, 1):
        first()  # what happens once, like loading torch, is none of the pace
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
    """Bytes per second that the disk of ``out`` takes, from writing and flushing 64 MB to a file without a name."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=existing(out), buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(_PROBE_BYTES // len(block)):
            file.write(block)
        sync_file(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - begin)


def available_memory() -> int | None:
    """Linux's own estimate of the memory that a program can take; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
