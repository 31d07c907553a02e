"""A bench's runs, each written as one JSON line when it ends, so that a rerun continues after the last whole line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from converters.console.errors import InputError
from converters.files.file_system import lock, sync_file
from converters.files.whole import json_bytes

FILE_NAME = "runs.jsonl"
FORMAT_VERSION = 1
_TORN_HEADER = b'{"format_version'  # how the first line starts
_LONGEST_HEADER = 1 << 20  # bytes; no more is read of a file that may not be ours


class RunJournal:
    """What was measured: ``runs``, oldest first, each with its ``point``, ``wall_s``, and ``figures`` or ``error``."""

    def __init__(self, descriptor: int, arguments: dict[str, Any], runs: list[dict[str, Any]]) -> None:
        self._descriptor = descriptor
        self._arguments = arguments
        self.runs = runs

    def begin(self) -> None:
        """Drop every run, also on the disk; runs to come belong to these arguments."""
        self.runs.clear()
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        _write_line(self._descriptor, {"format_version": FORMAT_VERSION, "arguments": self._arguments})

    def append(self, run: dict[str, Any]) -> None:
        """Add a run, which is on the disk when this returns."""
        _write_line(self._descriptor, run)
        self.runs.append(run)

    def of(self, point: dict[str, Any]) -> list[dict[str, Any]]:
        """The runs of a point that gave figures."""
        return [run for run in self.runs if run["point"] == point and "figures" in run]


@contextmanager
def open_journal(path: Path, arguments: dict[str, Any], force: bool) -> Iterator[RunJournal]:
    """The journal at ``path``, locked by this process, for runs that ``arguments`` determine.

    A torn last line, as a kill leaves it, is dropped. Raises InputError if the journal is damaged or has runs made with
    other arguments, if the file is not a journal, or if another process holds it. With ``force``, damage and other
    arguments are not errors: ``runs`` is empty, and the runs on the disk stay until the caller calls ``begin``, which
    it must do before it appends.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not lock(descriptor):
            raise InputError(f"Another llama-bench is writing to {path.parent}. Wait, or give another --out.")
        wanted = json.loads(json.dumps(arguments))
        lines = _read_lines(descriptor, path)
        runs = [] if force else _runs(lines, descriptor, path, wanted)
        journal = RunJournal(descriptor, wanted, runs)
        if not runs and not (force and len(lines) > 1):
            journal.begin()
        yield journal
    finally:
        os.close(descriptor)


def is_journal(path: Path) -> bool:
    """Whether there is a file at ``path`` that starts with a journal's header."""
    with suppress(OSError), path.open("rb") as file:
        return _parse(file.readline(_LONGEST_HEADER), header=True) is not None
    return False


def _read_lines(descriptor: int, path: Path) -> list[bytes]:
    """The lines with their line ends; none if the first one is torn. Raises InputError for a file of another kind."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        lines = file.read().splitlines(keepends=True)
    if not lines or _parse(lines[0], header=True) is not None:
        return lines
    torn = not lines[0].endswith(b"\n") and (lines[0].startswith(_TORN_HEADER) or _TORN_HEADER.startswith(lines[0]))
    if len(lines) == 1 and torn:
        return []
    raise InputError(
        f"{path} was not written by llama-bench, and --force keeps it. Move it away, or give another --out."
    )


def _runs(lines: list[bytes], descriptor: int, path: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs so far. Cuts the file after the last whole line and moves to its end."""
    records = []
    for number, line in enumerate(lines, 1):
        record = _parse(line, header=number == 1)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise InputError(f"{path} is damaged in line {number}. Give --force to measure again, or another --out.")
    if len(records) > 1 and records[0] != {"format_version": FORMAT_VERSION, "arguments": wanted}:
        raise InputError(
            f"{path.parent} was started with {_difference(records[0], wanted)}. Give the same, --force to measure "
            "again, or another --out."
        )
    os.ftruncate(descriptor, sum(map(len, lines[: len(records)])))
    os.lseek(descriptor, 0, os.SEEK_END)
    return records[1:]


def _parse(line: bytes, header: bool) -> dict[str, Any] | None:
    """The record of a whole line; None for anything else."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    if header:
        ours = isinstance(record.get("arguments"), dict) and type(record.get("format_version")) is int
        return record if ours else None
    outcome = are_figures(record["figures"]) if "figures" in record else isinstance(record.get("error"), str)
    whole = outcome and isinstance(record.get("point"), dict) and type(record.get("wall_s")) in (int, float)
    return record if whole else None


def are_figures(value: Any) -> bool:
    """Whether ``value`` has what every run reports: latency, prefill, and the device they were measured on."""
    if not isinstance(value, dict):
        return False
    times = [value.get(key) for key in ("per_token_latency_ms", "prefill_ms")]
    measured = all(type(time) in (int, float) and time >= 0 for time in times) and times[0] > 0
    return measured and isinstance(value.get("platform"), str) and type(value.get("chips")) is int


def _difference(header: dict[str, Any], wanted: dict[str, Any]) -> str:
    """In words, how the arguments that the journal was started with differ from these."""
    earlier = header["arguments"]
    if header.get("format_version") != FORMAT_VERSION:
        return "another version of llama-bench"
    changed = sorted(key for key in wanted.keys() | earlier.keys() if earlier.get(key) != wanted.get(key))
    digests = [key for key in changed if key.endswith("digest")]
    if digests:
        return "other shards (" + ", ".join(key.removesuffix("_digest").replace("_", "-") for key in digests) + ")"
    return "other arguments (" + ", ".join(f"{key} {earlier.get(key)}, now {wanted.get(key)}" for key in changed) + ")"


def _write_line(descriptor: int, record: dict[str, Any]) -> None:
    line = memoryview(json_bytes(record))
    while line:
        line = line[os.write(descriptor, line) :]
    sync_file(descriptor)
