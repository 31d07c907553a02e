"""Running a command line: it ends with its result, or with one line that says what is wrong and what to do.

Exit statuses: 0 done; 1 the tool's own fault, or a result that can't be trusted; 2 something that the user can fix
(input, options, disk, memory, packages); 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

from converters.console.errors import InputError, is_out_of_memory
from converters.console.notes import forget_notes, print_notes
from converters.console.process import prepare_process
from converters.console.standard_streams import drop_unwritten_output, prepare_standard_streams

DISTRIBUTION = "llama-tpu-toolchain"
TRACEBACK_VARIABLE = "LLAMA_TRACEBACK"
_OWN_FAULT, _USAGE_ERROR, _INTERRUPTED = 1, 2, 130
_OUT_OF_MEMORY = "Out of memory. Ask for smaller sizes, or cut the model with --layers."
# Optional packages, and the extra that installs them.
_EXTRAS = {"transformers": "bench", "matplotlib": "bench", "libtpu": "tpu"}
_LONGEST_MESSAGE = 400
_TRACEBACK = click.Option(
    ["--traceback"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    envvar=TRACEBACK_VARIABLE,
    callback=lambda context, option, value: _want_traceback(value),
    help=f"Print an error's traceback as well; {TRACEBACK_VARIABLE}=1 does so for every command.",
)
_traceback_wanted = False


def run(command: click.Command, args: Sequence[str] | None = None) -> NoReturn:
    """Run a click command and exit: with status 0, or whatever it raises, with one ``Error:`` line on stderr."""
    prepare_standard_streams()
    prepare_process()
    if _TRACEBACK not in command.params:
        command.params.append(_TRACEBACK)
    _want_traceback(False)
    forget_notes()
    try:
        status = command.main(args=args, standalone_mode=False)
        print_notes()
        sys.stdout.flush()
    except SystemExit:
        raise
    except click.ClickException as error:
        _fail(error.format_message())
    except InputError as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # click takes it for the end of what a user types
            _fail(_describe_fault(error.__cause__), _OWN_FAULT)
        _fail("Interrupted. Run the same command again; what can be resumed goes on.", _INTERRUPTED)
    except BrokenPipeError:
        drop_unwritten_output()
        sys.exit(1)  # the reader of our output has closed the pipe
    except OSError as error:
        _fail(_describe(error))
    except ImportError as error:
        _fail(_describe_import(error))
    except BaseException as error:  # a panic in a Rust library is not an Exception
        if is_out_of_memory(error):
            _fail(_OUT_OF_MEMORY)
        _fail(_describe_fault(error), _OWN_FAULT)
    finally:
        forget_notes()
    sys.exit(status if isinstance(status, int) else 0)


def wants_traceback() -> bool:
    """Whether the running command was asked for tracebacks."""
    return _traceback_wanted


def _want_traceback(value: bool) -> None:
    global _traceback_wanted
    _traceback_wanted = value


def _fail(message: str, status: int = _USAGE_ERROR) -> NoReturn:
    """End with an error. Must be called while the exception is being handled."""
    drop_unwritten_output()
    with suppress(OSError):  # stderr may be closed or full
        if _traceback_wanted:
            traceback.print_exc()
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


def _describe_import(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    extra = f"[{_EXTRAS[package]}]" if package in _EXTRAS else ""
    return f"{_shortened(error)}. Install what is missing or doesn't fit: pip install '{DISTRIBUTION}{extra}'."


def _describe_fault(error: BaseException) -> str:
    hint = "" if _traceback_wanted else f" The same command with --traceback (or {TRACEBACK_VARIABLE}=1) shows where."
    return f"{_shortened(error)}. This is a fault of the tool.{hint}"


def _shortened(error: BaseException) -> str:
    """Type and message of an exception on one line, cut to a readable length."""
    message = " ".join(str(error).split()).rstrip(".")
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 3] + "..."
