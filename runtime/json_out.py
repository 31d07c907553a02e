"""The targets of --json and the like: checked before a run, so that none is wasted; a file is written whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from converters.console.errors import InputError
from converters.files.whole import json_bytes, replace_file

STDOUT = "-"


def check_json_out(json_out: str | None) -> None:
    """Raise InputError for a path that can't be written; None means no output, ``-`` is stdout."""
    if json_out not in (None, STDOUT):
        check_file_out("--json", Path(json_out), or_stdout=True)


def check_file_out(option: str, path: Path | None, or_stdout: bool = False) -> None:
    """Raise InputError for a path, given by ``option``, that can't be written; None means no output."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        instead = ", or -" if or_stdout else ""
        raise InputError(f"{option} {path} can't be written. Give a file in a folder that is there{instead}.")


def write_json_out(json_out: str, value: Any) -> None:
    """Write a value as one line of JSON, in UTF-8 whatever the locale: to stdout, or to the file that --json names.

    Links are followed. A file is replaced as a whole; a pipe or a device is written to directly. Raises InputError if a
    file can't be written, for example because the disk is full.
    """
    content = json_bytes(value)
    if json_out == STDOUT:
        click.echo(content, nl=False)
        return
    write_file_out("--json", Path(json_out), content)


def write_file_out(option: str, given: Path, content: bytes) -> None:
    """Write a file as ``write_json_out`` does."""
    path = Path(os.path.realpath(given))
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            replace_file(path, content)
    except OSError as error:
        raise InputError(
            f"{option} {given} could not be written ({error.strerror or error}). Free some room or give another file, "
            "and run the same command again."
        ) from None
