"""A directory that a command fills: claimed before the first byte, finished by the file that it writes last."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from converters.config import read_json
from converters.errors import InputError
from converters.files import PARTIAL_SUFFIX, write_json

IN_PROGRESS = ".in-progress.json"
_LOCK = ".lock"
# What these commands write into their output; --force removes these and nothing else.
_OURS = re.compile(
    r"(config|generation_config|model\.safetensors\.index|random_init|shards|quantization_report)\.json"
    r"|model-\d{5}-of-\d{5}\.safetensors|chip-\d{2,}-of-\d{2,}\.safetensors|\.in-progress\.json|\.journal\.json|\.lock"
)


class State(Enum):
    """How an output directory was found."""

    EMPTY = "empty"
    UNFINISHED = "unfinished"  # the same arguments were interrupted: go on
    FINISHED = "finished"  # the same arguments have already made it


class Finished(NamedTuple):
    """What a finished directory says of itself: the arguments that made it, and the files that must be there."""

    arguments: dict[str, Any]
    files: tuple[str, ...]


@contextmanager
def claim(
    out: Path,
    arguments: dict[str, Any],
    finished: Callable[[Path], Finished | None],
    companions: frozenset[str],
    force: bool,
) -> Iterator[State]:
    """Hold ``out`` for one process while it is filled with what ``arguments`` describe.

    ``finished`` reads a directory that the caller finished before (None: it didn't; InputError: it did, and the record
    is damaged). ``companions`` are further file names that belong to the output. The caller writes the finishing file
    last, inside the context; leaving it with an exception keeps what there is for a rerun, unless a rerun could only
    end the same way: InputError in a directory that was empty leaves nothing. Raises InputError where the directory
    holds something else and ``force`` is off, or files that the caller never wrote, or another process is filling it.
    """
    with _directory(out), _lock(out):
        state, ours = _inspect(out, arguments, finished)
        if state is None and not force:
            raise InputError(
                f"{out} already holds something else (other arguments, or other files). "
                "Give --force to replace what this tool wrote there, or another --out."
            )
        if state is None and not ours:
            for path in _outputs(out, companions):
                raise InputError(f"{path} was not written by this tool, and --force keeps it. Give another --out.")
        if state is None or (force and state is State.FINISHED):
            remove_output(out, companions)
            state = State.EMPTY
        if state is not State.FINISHED:
            write_json(out / IN_PROGRESS, arguments)
        try:
            yield state
        except InputError:
            if state is State.EMPTY:
                remove_output(out, companions)
            raise
        (out / IN_PROGRESS).unlink(missing_ok=True)


def check_finished(directory: Path, command: str) -> None:
    """Raise InputError where ``directory`` is missing, or was left half-written by ``command``."""
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory. Give the one that {command} wrote.")
    if (directory / IN_PROGRESS).exists():
        raise InputError(f"{directory} is unfinished. Run its {command} again: it goes on where it stopped.")


def remove_output(out: Path, companions: frozenset[str]) -> None:
    """Remove the files that these commands write, so that a directory can be filled anew."""
    for path in _outputs(out, companions):
        path.unlink()


def _outputs(out: Path, companions: frozenset[str]) -> list[Path]:
    """The files in ``out`` that bear names of these commands' output, unfinished ones included."""
    return [
        path
        for path in out.iterdir()
        if path.is_file()
        and path.name != _LOCK
        and (_OURS.fullmatch(name := path.name.removesuffix(PARTIAL_SUFFIX)) or name in companions)
    ]


def _inspect(
    out: Path, arguments: dict[str, Any], finished: Callable[[Path], Finished | None]
) -> tuple[State | None, bool]:
    """The state, None where ``out`` holds something else; and whether the caller's command wrote what is there."""
    arguments = json.loads(json.dumps(arguments))  # as a file would hold them
    if all(path.name == _LOCK for path in out.iterdir()):
        return State.EMPTY, True
    try:
        if (out / IN_PROGRESS).exists():
            return (State.UNFINISHED if read_json(out / IN_PROGRESS) == arguments else None), True
        made = finished(out)
    except InputError:
        return None, True
    if made is None or made.arguments != arguments:
        return None, made is not None
    whole = all((out / name).is_file() for name in made.files)
    return (State.FINISHED if whole else State.UNFINISHED), True


@contextmanager
def _directory(out: Path) -> Iterator[None]:
    """``out`` with its parents, made where they are missing, and gone again where an InputError leaves them empty."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Give --out a directory.")
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except InputError:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


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
