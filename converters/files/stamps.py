"""Sizes and times of files, which tell that one has changed without reading it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """A file's size in bytes, and the times in ns of its last write and of its last change of any kind.

    No program can set the last one back. A new owner, mode or number of links changes it too.
    """

    nbytes: int
    written_ns: int
    changed_ns: int


def stamp(path: Path) -> Stamp:
    """Raises OSError where the file is missing."""
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def stamps(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamps of several files."""
    return {path: stamp(path) for path in paths}
