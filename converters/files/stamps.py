"""Sizes and times of files, which tell that one has changed without reading it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def stamp_files(paths: Iterable[Path], changes: bool = False) -> dict[str, list[int]]:
    """Size in bytes and time of the last write in ns of each file, by name. Raises OSError for a missing file.

    With ``changes`` also the time of the last change of any kind, which no program can set back; a change of a file's
    owner, mode or number of links counts too.
    """
    stamps = {}
    for path in paths:
        status = path.stat()
        stamps[path.name] = [status.st_size, status.st_mtime_ns] + ([status.st_ctime_ns] if changes else [])
    return stamps
