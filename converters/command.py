"""How every command line ends: its result, or one line that says what is wrong and what to do."""

from __future__ import annotations

import errno
import io
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

from converters.errors import InputError, is_out_of_memory
from converters.notes import forget_notes, print_notes

DISTRIBUTION = "llama-tpu-toolchain"
_USAGE_ERROR = 2
_OUT_OF_MEMORY = "Out of memory. Ask for smaller sizes, or cut the model with --layers."


def run(command: click.Command, args: Sequence[str] | None = None) -> NoReturn:
    """Run a click command and exit: 0, or 2 with one ``Error:`` line on stderr for anything the user can mend."""
    _allow_many_files()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or a text that the terminal can't show
    try:
        status = command.main(args=args, standalone_mode=False)
        print_notes()
        sys.stdout.flush()
    except click.ClickException as error:
        _fail(error.format_message())
    except InputError as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        _fail("Interrupted. Run the same command again; what can be resumed goes on.", 130)
    except BrokenPipeError:
        # Whoever read our output has left; keep Python from complaining about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(_describe(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(_OUT_OF_MEMORY)
    finally:
        forget_notes()
    sys.exit(status if isinstance(status, int) else 0)


def _allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may: a large model has hundreds, all open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS refuses an unlimited number
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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
