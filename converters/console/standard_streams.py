"""stdin, stdout and stderr as every command needs them: open, and able to print any text."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def prepare_standard_streams() -> None:
    """Open the streams that the process was started without, and have stdout escape what it can't encode."""
    _open_missing()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or a text that the terminal can't show


def keep_stdout_from_libraries() -> None:
    """Leave stdout to Python: what C libraries print there from now on is dropped.

    gloo, for one, announces every connection there, amid the JSON that a script reads.
    """
    try:
        own = os.dup(sys.stdout.fileno())
    except (OSError, ValueError):  # no file, as in tests
        return
    sys.stdout.flush()
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(own, "w")), encoding, errors, line_buffering=os.isatty(own)
    )


def drop_unwritten_output() -> None:
    """Write what stdout still takes, and drop the rest, about which Python would complain at exit.

    stdout takes nothing where its reader has gone or its disk is full.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_missing() -> None:
    """Open the null device for closed streams (``>&-``, ``2>&-``; some daemons and schedulers close them).

    Otherwise the next file opened would get the number of stdout or stderr, and with it what C libraries print.
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
