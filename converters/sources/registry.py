"""Sources of weights that other packages open, found by their entry points, so that they aren't imported here."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from converters.sources.source import TensorSource

GROUP = "llama_convert.sources"  # an entry point is named after the file by which its kind of directory is recognized


def find_opener(directory: Path) -> Callable[[Path], TensorSource] | None:
    """The function that opens a directory that holds a file of a registered name; None for any other directory."""
    for entry in entry_points(group=GROUP):
        if (directory / entry.name).is_file():
            return entry.load()
    return None
