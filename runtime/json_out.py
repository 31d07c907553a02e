"""Where --json and the like write to: checked before a run is spent on it; a file is written whole."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from converters.errors import InputError
from converters.files import partial_path, write_whole


def check_json_out(json_out: str | None) -> None:
    """Raise InputError for a path that can't be written; None writes nothing, ``-`` is stdout."""
    if json_out in (None, "-"):
        return
    path = Path(json_out)
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"--json {path} can't be written. Give a file in a folder that is there, or -.")


def check_folder(path: Path) -> None:
    """Make a folder that is to be written into. Raises InputError where it can't be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise InputError(f"The folder {path} can't be made or written into. Give another.")


def write_json_out(json_out: str, line: str) -> None:
    """Write a line to the file that --json names: whole, through a link; into a pipe or a device as it is.

    Raises InputError where that fails, the disk being full for instance.
    """
    path, content = Path(os.path.realpath(json_out)), (line + "\n").encode()
    is_file = path.is_file() or not path.exists()
    try:
        if is_file:
            write_whole(path, content)
        else:
            path.write_bytes(content)
    except OSError as error:
        if is_file:
            with suppress(OSError):
                partial_path(path).unlink()
        raise InputError(
            f"--json {json_out} could not be written ({error.strerror or error}). Free some room or give another file, "
            "and run the same command again."
        ) from None
