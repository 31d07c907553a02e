"""Sources of weights that other packages open, announced as entry points, so that none of them is imported here."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from converters.sources.source import TensorSource

GROUP = "llama_convert.sources"  # an entry point's name is the file that tells its kind of directory


def find_opener(directory: Path) -> Callable[[Path], TensorSource] | None:
    """The function that opens a directory which holds a file of a registered name; None for any other directory."""
    for entry in entry_points(group=GROUP):
        if (directory / entry.name).is_file():
            return entry.load()
    return None
