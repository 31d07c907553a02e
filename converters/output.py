"""A directory that a command fills: claimed before the first byte, finished by the file that it writes last."""

from __future__ import annotations

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
from converters.file_system import lock
from converters.files import PARTIAL_SUFFIX, partial_path, write_json
from converters.fingerprint import stamp_files
from converters.journal import FILE_NAME as JOURNAL

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
    source_files: list[Path],
    finished: Callable[[Path], Finished | None],
    companions: frozenset[str],
    force: bool,
) -> Iterator[State]:
    """Hold ``out`` for one process while it is filled with what ``arguments`` describe, read from ``source_files``.

    ``finished`` reads a directory that the caller finished before (None: it didn't; InputError: it did, and the record
    is damaged). ``companions`` are further file names that belong to the output. The caller writes the finishing file
    last, inside the context; leaving it with an exception keeps what there is for a rerun, unless a rerun could only
    end the same way: InputError in a directory that was empty leaves nothing. Raises InputError where the directory
    holds something else and ``force`` is off, or files that the caller never wrote, or another process is filling it.
    """
    with _directory(out), _lock(out):
        begun = json.loads(json.dumps({"arguments": arguments, "source_files": stamp_files(source_files)}))
        found = _inspect(out, begun, finished)
        state = found.state
        if state is None and not force:
            raise InputError(
                f"{out} {found.problem}. Give --force to replace what this tool wrote there, or another --out."
            )
        if state is None and not found.ours:
            for path in _outputs(out, companions):
                raise InputError(f"{path} was not written by this tool, and --force keeps it. Give another --out.")
        if state is None or (force and state is State.FINISHED):
            remove_output(out, companions)
            state = State.EMPTY
        if state is not State.FINISHED:
            write_json(out / IN_PROGRESS, begun)
        try:
            yield state
        except InputError:
            if state is State.EMPTY:
                remove_output(out, companions)
            raise
        # In this order: a kill in between leaves a journal by which the rerun sees that nothing is left to do.
        (out / IN_PROGRESS).unlink(missing_ok=True)
        for path in (out / JOURNAL, partial_path(out / JOURNAL)):
            path.unlink(missing_ok=True)


def check_finished(directory: Path, command: str, last: str) -> None:
    """Raise InputError where ``directory`` is missing, or was left by ``command`` before its ``last`` file."""
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory. Give the one that {command} wrote.")
    if (directory / IN_PROGRESS).exists():
        missing = sorted(path.name.removesuffix(PARTIAL_SUFFIX) for path in directory.glob("*" + PARTIAL_SUFFIX))
        raise InputError(
            f"{directory} is unfinished ({', '.join(missing[:3]) or last} not whole yet). Run its {command} again: it "
            "goes on where it stopped."
        )


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


class _Found(NamedTuple):
    """The state of a directory; None, with the problem in words, where it holds something else."""

    state: State | None
    problem: str = ""
    ours: bool = True  # whether the caller's command wrote what is there


def _inspect(out: Path, begun: dict[str, Any], finished: Callable[[Path], Finished | None]) -> _Found:
    if all(path.name in (_LOCK, IN_PROGRESS + PARTIAL_SUFFIX) for path in out.iterdir()):
        return _Found(State.EMPTY)
    try:
        if (out / IN_PROGRESS).exists():
            record = read_json(out / IN_PROGRESS)
            if record == begun:
                return _Found(State.UNFINISHED)
            return _Found(None, f"was begun with {_difference(record, begun)}")
        made = finished(out)
    except InputError as error:
        return _Found(None, f"is damaged ({str(error).rstrip('.')})")
    if made is None:
        return _Found(None, "already holds other files", ours=False)
    if made.arguments != begun["arguments"]:
        return _Found(None, f"was made with {_difference({'arguments': made.arguments}, begun)}")
    whole = all((out / name).is_file() for name in made.files)
    return _Found(State.FINISHED if whole else State.UNFINISHED)


def _difference(record: Any, begun: dict[str, Any]) -> str:
    """In words, how the arguments of an earlier run differ from this one's."""
    earlier = record.get("arguments") if isinstance(record, dict) else None
    if not isinstance(earlier, dict):
        return "other arguments"
    wanted = begun["arguments"]
    if earlier.get("source_fingerprint") != wanted["source_fingerprint"]:
        return "another source, or its source has changed since"
    changed = [key for key in wanted if earlier.get(key) != wanted[key]]
    if not changed:
        return "a source that has changed since"
    return "other arguments (" + ", ".join(f"{key} {earlier.get(key)}, now {wanted[key]}" for key in changed) + ")"


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
        held = lock(file.fileno()) and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        if not held:  # or the holder has just left and taken the file with it
            raise InputError(f"Another process is writing to {out}. Wait for it, or give another --out.")
        try:
            yield
        finally:
            os.unlink(path)
