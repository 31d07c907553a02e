"""A directory that a command fills: claimed before the first byte, finished by the file that it writes last."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from converters.config import read_json
from converters.errors import InputError
from converters.files import PARTIAL_SUFFIX, write_json

IN_PROGRESS = ".in-progress.json"
_LOCK = ".lock"
# What these commands write into their output; --force removes these and nothing else.
_OURS = re.compile(
    r"(config|generation_config|model\.safetensors\.index|random_init|shards|quantization_report)\.json"
    r"|model-\d{5}-of-\d{5}\.safetensors|chip-\d{2,}-of-\d{2,}\.safetensors|\.in-progress\.json|\.lock"
)


class State(Enum):
    """How an output directory was found."""

    EMPTY = "empty"
    UNFINISHED = "unfinished"  # the same arguments were interrupted: go on
    FINISHED = "finished"  # the same arguments have already made it


@contextmanager
def claim(
    out: Path,
    arguments: dict[str, Any],
    finished_arguments: Callable[[Path], dict[str, Any] | None],
    companions: frozenset[str],
    force: bool,
) -> Iterator[State]:
    """Hold ``out`` for one process while it is filled with what ``arguments`` describe.

    ``finished_arguments`` tells with which arguments a finished directory was made (None: it isn't finished).
    ``companions`` are further file names that belong to the output. The caller writes the finishing file last, inside
    the context; leaving it with an exception keeps what there is for a rerun. Raises InputError where the directory
    holds something else and ``force`` is off, or another process is filling it.
    """
    _make_directory(out)
    with _lock(out):
        state = _inspect(out, arguments, finished_arguments)
        if state is None and not force:
            raise InputError(
                f"{out} already holds something else (other arguments, or other files). "
                "Give --force to replace what this tool wrote there, or another --out."
            )
        if state is None or (force and state is State.FINISHED):
            remove_output(out, companions)
            state = State.EMPTY
        if state is not State.FINISHED:
            write_json(out / IN_PROGRESS, arguments)
        yield state
        (out / IN_PROGRESS).unlink(missing_ok=True)


def check_finished(directory: Path, command: str) -> None:
    """Raise InputError where ``directory`` is missing, or was left half-written by ``command``."""
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory. Give the one that {command} wrote.")
    if (directory / IN_PROGRESS).exists():
        raise InputError(f"{directory} is unfinished. Run its {command} again: it goes on where it stopped.")


def remove_output(out: Path, companions: frozenset[str]) -> None:
    """Remove the files that these commands write, so that a directory can be filled anew."""
    for path in out.iterdir():
        name = path.name.removesuffix(PARTIAL_SUFFIX)
        if (_OURS.fullmatch(name) or name in companions) and name != _LOCK and path.is_file():
            path.unlink()


def _inspect(
    out: Path, arguments: dict[str, Any], finished_arguments: Callable[[Path], dict[str, Any] | None]
) -> State | None:
    arguments = json.loads(json.dumps(arguments))  # as a file would hold them
    if (out / IN_PROGRESS).exists():
        return State.UNFINISHED if read_json(out / IN_PROGRESS) == arguments else None
    if all(path.name == _LOCK for path in out.iterdir()):
        return State.EMPTY
    return State.FINISHED if finished_arguments(out) == arguments else None


def _make_directory(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Give --out a directory.")
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """An advisory lock that the operating system drops with the process, however that ends."""
    path = out / _LOCK
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another process is writing to {out}. Wait for it, or give another --out.") from None
        try:
            yield
        finally:
            os.unlink(path)
