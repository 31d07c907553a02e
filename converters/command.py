"""How every command line ends: its result, or one line that says what is wrong and what to do."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from converters.errors import InputError

DISTRIBUTION = "llama-tpu-toolchain"
_USAGE_ERROR = 2
_OUT_OF_MEMORY = "Out of memory. Ask for smaller sizes, or cut the model with --layers."


def run(command: click.Command, args: Sequence[str] | None = None) -> NoReturn:
    """Run a click command and exit: 0, or 2 with one ``Error:`` line on stderr for anything the user can mend."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or a text that the terminal can't show
    try:
        status = command.main(args=args, standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        _fail(error.format_message())
    except InputError as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        _fail("Interrupted. Run the same command again to go on.", 130)
    except BrokenPipeError:
        # Whoever read our output has left; keep Python from complaining about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(_describe(error))
    except MemoryError:
        _fail(_OUT_OF_MEMORY)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's words; it has no class for this on the CPU
            raise
        _fail(_OUT_OF_MEMORY)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int = _USAGE_ERROR) -> NoReturn:
    click.echo("Error: " + " ".join(message.split()), err=True)
    sys.exit(status)


def _describe(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    reason = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}. Free some room and run the same command again, or choose another --out."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}. Choose a path that you may read and write."
    return f"{reason}. Check the path and the disk, and run the same command again."
