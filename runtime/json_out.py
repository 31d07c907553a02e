"""Where --json and the like write to: checked before a run is spent on it; a file is written whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from converters.errors import InputError
from converters.files import json_bytes, write_whole

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

    A file is written whole, through a link; a pipe or a device as it is.
    """
    content = json_bytes(value)
    if json_out == STDOUT:
        click.echo(content, nl=False)
        return
    path = Path(os.path.realpath(json_out))
    if path.exists() and not path.is_file():
        path.write_bytes(content)
    else:
        write_whole(path, content)
