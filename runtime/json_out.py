"""Where --json writes to: checked before a run is spent on it."""

from __future__ import annotations

import os
from pathlib import Path

from converters.errors import InputError


def check_json_out(json_out: str | None) -> None:
    """Raise InputError for a path that can't be written; None writes nothing, ``-`` is stdout."""
    if json_out in (None, "-"):
        return
    path = Path(json_out)
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"--json {path} can't be written. Give a file in a folder that is there, or -.")
