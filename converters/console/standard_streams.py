"""stdin, stdout and stderr as every command wants them: open, and never a reason to fail for what they can't show."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def prepare_standard_streams() -> None:
    """Open the streams that the process was started without, and have stdout escape what its encoding lacks."""
    _open_missing()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or a text that the terminal can't show


def drop_unwritten_output() -> None:
    """Give up what stdout can't take (its reader has left, its disk is full), of which Python would complain at exit.

    What can still be written is.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_missing() -> None:
    """Open the null device in place of what was closed (``>&-``, ``2>&-``; some daemons and schedulers do that).

    Else a file that is opened next would get the number of stdout or stderr, and what is printed below Python with it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, _null_stream(mode))


def _null_stream(mode: str) -> TextIO:
    return open(os.devnull, mode, encoding="utf-8", errors="backslashreplace")
