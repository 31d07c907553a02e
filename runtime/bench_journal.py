"""The runs of a bench as they come, one JSON line each, so that a rerun goes on after the last whole line."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.errors import InputError

FILE_NAME = "runs.jsonl"
FORMAT_VERSION = 1
_TORN_HEADER = b'{"format_version'  # what the first line begins with


class RunJournal:
    """What was measured: ``runs``, oldest first, each with its ``point``, ``wall_s``, and ``figures`` or ``error``."""

    def __init__(self, descriptor: int, runs: list[dict[str, Any]]) -> None:
        self._descriptor = descriptor
        self.runs = runs

    def append(self, run: dict[str, Any]) -> None:
        """Keep a run: when this returns, it is on the disk."""
        _write_line(self._descriptor, run)
        self.runs.append(run)

    def of(self, point: dict[str, Any]) -> list[dict[str, Any]]:
        """The runs of a point that gave figures."""
        return [run for run in self.runs if run["point"] == point and "figures" in run]


@contextmanager
def open_journal(path: Path, arguments: dict[str, Any], force: bool) -> Iterator[RunJournal]:
    """The journal at ``path``, held by this process alone, for runs that are a function of ``arguments``.

    A torn last line, which a kill leaves, is dropped. Raises InputError where the journal holds runs made with other
    arguments or is damaged (``force`` begins anew), or where another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another llama-bench is writing to {path.parent}. Wait, or give another --out.") from None
        wanted = json.loads(json.dumps(arguments))
        runs = [] if force else _read(descriptor, path, wanted)
        if not runs:
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_END)
            _write_line(descriptor, {"format_version": FORMAT_VERSION, "arguments": wanted})
        yield RunJournal(descriptor, runs)
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs so far; the file is cut behind the last whole line, and stands at its end."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        content = file.read()
    lines = content.splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        record = _parse(line, header=number == 1)
        if record is None and (number < len(lines) or (number == 1 and not _TORN_HEADER.startswith(line[:8]))):
            raise InputError(f"{path} is damaged in line {number}. Give --force to measure anew, or another --out.")
        if record is None:
            lines.pop()
        else:
            records.append(record)
    os.ftruncate(descriptor, sum(map(len, lines)))
    os.lseek(descriptor, 0, os.SEEK_END)
    if len(records) > 1 and records[0] != {"format_version": FORMAT_VERSION, "arguments": wanted}:
        raise InputError(
            f"{path.parent} was begun with {_difference(records[0], wanted)}. Give the same, --force to measure anew, "
            "or another --out."
        )
    return records[1:]


def _parse(line: bytes, header: bool) -> dict[str, Any] | None:
    """A whole line's record; None for anything else."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    if header:
        return record if isinstance(record.get("arguments"), dict) else None
    outcome = are_figures(record["figures"]) if "figures" in record else isinstance(record.get("error"), str)
    whole = outcome and isinstance(record.get("point"), dict) and type(record.get("wall_s")) in (int, float)
    return record if whole else None


def are_figures(value: Any) -> bool:
    """Whether ``value`` is what a run gives: latency and prefill, and the device that they are of."""
    if not isinstance(value, dict):
        return False
    times = [value.get(key) for key in ("per_token_latency_ms", "prefill_ms")]
    measured = all(type(time) in (int, float) and time >= 0 for time in times) and times[0] > 0
    return measured and isinstance(value.get("platform"), str) and type(value.get("chips")) is int


def _difference(header: dict[str, Any], wanted: dict[str, Any]) -> str:
    """In words, how the arguments that the journal was begun with differ from these."""
    earlier = header["arguments"]
    if header.get("format_version") != FORMAT_VERSION:
        return "another version of llama-bench"
    changed = sorted(key for key in wanted.keys() | earlier.keys() if earlier.get(key) != wanted.get(key))
    digests = [key for key in changed if key.endswith("digest")]
    if digests:
        return "other shards (" + ", ".join(key.removesuffix("_digest").replace("_", "-") for key in digests) + ")"
    return "other arguments (" + ", ".join(f"{key} {earlier.get(key)}, now {wanted.get(key)}" for key in changed) + ")"


def _write_line(descriptor: int, record: dict[str, Any]) -> None:
    line = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
    while line:
        line = line[os.write(descriptor, line) :]
    os.fsync(descriptor)
