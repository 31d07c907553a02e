"""A command run in a process of its own, in blocks so small and flushed so often that a kill may land anywhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import quantize.job
from converters.cli import command as convert
from converters.console.command import run
from converters.files import row_blocks
from converters.output import journal
from quantize.cli import command as quantize

COMMANDS = {"convert": convert, "quantize": quantize}


def main(name: str, arguments: list[str], log: Path) -> None:
    """Run a command with its output in ``log``; ends the process with the command's exit status."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    journal.SYNC_BYTES = 20_000
    row_blocks.row_blocks.__defaults__ = (2048,)
    run(COMMANDS[name], arguments)
