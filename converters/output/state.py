"""What state an output directory is in, found out without changing it: empty, unfinished, finished, someone else's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from converters.console.errors import InputError
from converters.files.whole import PARTIAL_SUFFIX, FileRecord, partial_path
from converters.output.journal import FILE_NAME as JOURNAL
from converters.output.lock import FILE_NAME as LOCK
from converters.output.record import IN_PROGRESS, WRITTEN, Record, as_stored, read_record

# A directory with such a file that we didn't write holds another model; our files would be taken for parts of it.
_MODEL = re.compile(r"(config|shards|random_init|params|.*\.index)\.json|.*\.(safetensors|bin|pth|pt|gguf)(\.partial)?")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_KEPT = "was not written by this tool, and --force keeps it. Move it away, or give another --out."


class State(Enum):
    """What a run finds in its output directory."""

    EMPTY = "empty"
    UNFINISHED = "unfinished"  # begun with the same arguments: go on
    FINISHED = "finished"  # already made with the same arguments


class Finished(NamedTuple):
    """What a finished directory without a record says about itself; None stands for a digest that it doesn't have."""

    arguments: dict[str, Any]
    files: dict[str, FileRecord | None]


class Found(NamedTuple):
    """A directory's state, the record to begin with, and the names of the files there that these tools wrote."""

    state: State
    record: Record
    mine: frozenset[str] = frozenset()


def examine(out: Path, begun: Record, finished: Callable[[Path], Finished | None], force: bool) -> Found:
    """What the run of the record ``begun`` finds in ``out``, which is only looked at.

    ``finished`` reads a directory that has no record; see ``claim``. Raises InputError where the directory has to be
    left alone, or may only be replaced with ``force``.
    """
    if (out / IN_PROGRESS).exists():
        found = _examine_unfinished(out, begun, force)
    elif (out / WRITTEN).exists():
        found = _examine_written(out, begun, force)
    else:
        found = _examine_unrecorded(out, begun, finished, force)
    if found.state is not State.FINISHED:
        _check_foreign(out, found)
    return found


def check_finished(directory: Path, command: str, last: str) -> None:
    """Raise InputError where ``directory`` is missing, or ``command`` stopped before writing its ``last`` file."""
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory. Give the one that {command} wrote.")
    if (directory / IN_PROGRESS).exists():
        missing = sorted(path.name.removesuffix(PARTIAL_SUFFIX) for path in directory.glob("*" + PARTIAL_SUFFIX))
        raise InputError(
            f"{directory} is unfinished ({', '.join(missing[:3]) or last} not whole yet). Run its {command} again: it "
            "goes on where it stopped."
        )


def recorded_names(out: Path, arguments: dict[str, Any], finished: Callable[[Path], Finished | None]) -> frozenset[str]:
    """The files that a run with these arguments has written or begun in ``out``; none where there was no such run."""
    earlier: Record | Finished | None = None
    with suppress(InputError):  # claim reports what is wrong there
        names = [name for name in (IN_PROGRESS, WRITTEN) if (out / name).is_file()]
        earlier = read_record(out / names[0]) if names else finished(out)
    if earlier is None or as_stored(earlier.arguments) != as_stored(arguments):
        return frozenset()
    return frozenset(earlier.files) if isinstance(earlier, Finished) else earlier.names


def _examine_unfinished(out: Path, begun: Record, force: bool) -> Found:
    record = read_record(out / IN_PROGRESS)
    if record.same_run(begun):
        return Found(State.UNFINISHED, _as_left(out, record), frozenset(record.files) | set(record.replaced))
    _check_command(out, record, begun)
    if not record.same_output(begun):
        return _replace(out, f"was started with {_difference(record, begun)}", begun, record.names, force)
    if not force:
        raise _refusal(out, f"was begun for other files ({_shown(set(record.wanted) - set(begun.wanted))})")
    return _keep_whole(begun, record, {name: file for name, file in record.files.items() if (out / name).is_file()})


def _examine_written(out: Path, begun: Record, force: bool) -> Found:
    record = read_record(out / WRITTEN)
    _check_command(out, record, begun)
    if not record.same_output(begun):
        return _replace(out, f"was made with {_difference(record, begun)}", begun, record.names, force)
    present = {name: file for name, file in record.files.items() if (out / name).is_file()}
    problems = {name: problem for name, file in present.items() if (problem := file.problem(out / name))}
    if force:
        return _keep_whole(begun, record, {name: file for name, file in present.items() if name not in problems})
    for name, problem in problems.items():
        raise InputError(f"{out / name} {problem}. Give --force to make it again, or another --out.")
    if present.keys() >= set(begun.wanted):
        return Found(State.FINISHED, record, record.names)
    return Found(State.UNFINISHED, replace(begun, files=present, state=record.state), record.names)


def _examine_unrecorded(out: Path, begun: Record, finished: Callable[[Path], Finished | None], force: bool) -> Found:
    """A directory that is missing, empty, someone else's, a seed's, or of a version that kept no record."""
    entries = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if JOURNAL in entries:  # ours is never without a record
        raise InputError(f"{out / JOURNAL} {_KEPT}")
    if entries <= {LOCK, LOCK + PARTIAL_SUFFIX, IN_PROGRESS + PARTIAL_SUFFIX}:
        return Found(State.EMPTY, begun)
    try:
        made = finished(out)
    except InputError as error:
        return _replace(out, _damaged(error), begun, frozenset(), force)
    if made is None:
        return _replace(out, "already holds other files", begun, frozenset(), force)
    mine = frozenset(made.files)
    for name, file in made.files.items():
        if file is not None and (out / name).is_file() and (problem := file.problem(out / name)):
            return _replace(out, f"holds {name}, which {problem}", begun, mine, force)
    if as_stored(made.arguments) != begun.arguments:
        difference = _difference(replace(begun, arguments=made.arguments), begun)
        return _replace(out, f"was made with {difference}", begun, mine, force)
    missing = [name for name in begun.wanted if not (out / name).is_file()]
    if missing or force:
        return _replace(out, f"lacks {_shown(missing)}", begun, mine, force)
    return Found(State.FINISHED, begun)


def _check_command(out: Path, record: Record, begun: Record) -> None:
    if record.command != begun.command:
        raise InputError(
            f"{out} was written by {record.command}, and --force keeps it: it replaces only what the same command "
            "wrote. Give another --out."
        )


def _as_left(out: Path, record: Record) -> Record:
    """An unfinished run's record without the files that are gone. Raises InputError for a file that has changed."""
    there = {}
    for name, file in record.files.items():
        path, partial = out / name, partial_path(out / name)
        if path.is_file():
            # An older file whose replacement lies beside it was about to be replaced: it hasn't been changed.
            problem = file.problem(path)
            if problem and not (partial.is_file() and not file.problem(partial)):
                raise InputError(f"{path} {problem}. Move it away, or give another --out.")
        if path.is_file() or partial.is_file() or name in record.wanted:
            there[name] = file
    return replace(record, files=there)


def _replace(out: Path, problem: str, begun: Record, mine: frozenset[str], force: bool) -> Found:
    """Begin anew and replace the files ``mine`` if ``force`` allows it. Otherwise raise InputError with the problem."""
    if not force:
        raise _refusal(out, problem)
    for path in sorted(out.iterdir()):
        if not mine and _MODEL.fullmatch(path.name):
            raise InputError(f"{path} {_KEPT}")
    return Found(State.EMPTY, replace(begun, replaced=tuple(sorted(mine))), mine)


def _keep_whole(begun: Record, record: Record, whole: Mapping[str, FileRecord]) -> Found:
    """Make the wanted files anew, and keep the others of the same output that are ``whole``."""
    kept = {name: file for name, file in whole.items() if name not in begun.wanted}
    replaced = tuple(sorted(record.names - kept.keys()))
    state = State.UNFINISHED if kept else State.EMPTY
    return Found(
        state, replace(begun, files=kept, replaced=replaced, state=record.state if kept else None), record.names
    )


def _check_foreign(out: Path, found: Found) -> None:
    """Raise InputError where a file that these tools didn't write has a name that this run needs."""
    for name in found.record.wanted:
        path, partial = out / name, partial_path(out / name)
        if os.path.lexists(path) and (name not in found.mine or path.is_dir()):
            raise InputError(f"{path} {_KEPT}")
        if os.path.lexists(partial) and name not in found.mine and found.state is not State.UNFINISHED:
            raise InputError(f"{partial} {_KEPT}")
    for name in _SINGLE_FILES:  # readers would take it for the model, whatever else is there
        if name not in found.mine and os.path.lexists(out / name):
            raise InputError(f"{out / name} {_KEPT}")


def _refusal(out: Path, problem: str) -> InputError:
    return InputError(f"{out} {problem}. Give --force to replace what this tool wrote there, or another --out.")


def _damaged(error: InputError) -> str:
    return f"is damaged ({str(error).rstrip('.')})"


def _shown(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _difference(earlier: Record, wanted: Record) -> str:
    """In words, how the arguments of an earlier run differ from this one's."""
    if earlier.arguments.get("source_fingerprint") != wanted.arguments["source_fingerprint"]:
        return "another source, or its source has changed since"
    keys = dict.fromkeys((*wanted.arguments, *earlier.arguments))
    changed = [key for key in keys if earlier.arguments.get(key) != wanted.arguments.get(key)]
    if not changed:
        return "a source that has changed since (its files have other sizes or times)"
    return (
        "other arguments ("
        + ", ".join(f"{key} {earlier.arguments.get(key)}, now {wanted.arguments.get(key)}" for key in changed)
        + ")"
    )
