"""Where --json and the like write to: checked before a run is spent on it; a file is written whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from converters.console.errors import InputError
from converters.files.whole import json_bytes, replace_file

STDOUT = "-"


def check_json_out(json_out: str | None) -> None:
    """Raise InputError for a path that can't be written; None writes nothing, ``-`` is stdout."""
    if json_out in (None, STDOUT):
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


def write_json_out(json_out: str, value: Any) -> None:
    """Write a value on one line of JSON, in UTF-8 whatever the locale: to stdout, or to the file that --json names.

    A file is written whole, through a link; a pipe or a device as it is. Raises InputError where a file can't be
    written, the disk being full for instance.
    """
    content = json_bytes(value)
    if json_out == STDOUT:
        click.echo(content, nl=False)
        return
    path = Path(os.path.realpath(json_out))
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            replace_file(path, content)
    except OSError as error:
        raise InputError(
            f"--json {json_out} could not be written ({error.strerror or error}). Free some room or give another file, "
            "and run the same command again."
        ) from None
