"""A directory that a command fills: claimed before the first byte, finished by the file that it writes last."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from converters.console.errors import InputError
from converters.files.whole import PARTIAL_SUFFIX, FileRecord, json_bytes, partial_path, publish, write_partial
from converters.output.journal import FILE_NAME as JOURNAL
from converters.output.lock import FILE_NAME as LOCK
from converters.output.lock import lock
from converters.output.record import IN_PROGRESS, WRITTEN, Record, as_stored, existing_bytes, read_record, remove
from converters.sources.fingerprint import stamp_files

# A folder of somebody else's with such a file holds a model; ours beside it would be taken for parts of that one.
_MODEL = re.compile(r"(config|shards|random_init|params|.*\.index)\.json|.*\.(safetensors|bin|pth|pt|gguf)(\.partial)?")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_OWN = (LOCK, IN_PROGRESS, WRITTEN, JOURNAL)
_KEPT = "was not written by this tool, and --force keeps it. Move it away, or give another --out."


class State(Enum):
    """How an output directory was found."""

    EMPTY = "empty"
    UNFINISHED = "unfinished"  # begun with the same arguments: go on
    FINISHED = "finished"  # the same arguments have already made it


class Finished(NamedTuple):
    """What a finished directory without a record says of itself; a digest that it doesn't have is None."""

    arguments: dict[str, Any]
    files: dict[str, FileRecord | None]


@dataclass(frozen=True)
class Wanted:
    """What ``command`` is to make: the directory, what its content is a function of, and the names of all its files.

    ``sources`` are the files that values are read from. ``names`` may be a part of an output that has more files: then
    the others of the same arguments stay. Without ``recorded`` the finishing file says all that there is to know.
    """

    command: str
    out: Path
    arguments: dict[str, Any]
    sources: tuple[Path, ...]
    names: tuple[str, ...]
    recorded: bool = True

    def record(self) -> Record:
        """What is known before the first byte, the source's sizes and times as they are now."""
        return Record(self.command, as_stored(self.arguments), stamp_files(self.sources), tuple(sorted(self.names)))


class Output:
    """The directory while this process fills it."""

    def __init__(self, wanted: Wanted, found: _Found) -> None:
        self.state = found.state
        self.directory = wanted.out
        self._recorded = wanted.recorded
        self._sources = wanted.sources
        self._stamps = stamp_files(wanted.sources, changes=True)
        self._record = found.record

    @property
    def arguments(self) -> dict[str, Any]:
        """What the content is a function of."""
        return self._record.arguments

    @property
    def caller_state(self) -> Any:
        """What ``add`` was last given by a run of the same arguments."""
        return self._record.state

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """The files that are whole, those of earlier runs of the same arguments too."""
        return self._record.files

    def take_whole(self, name: str) -> bool:
        """Whether a file is there as it was written; one that a run was ended before naming is given its name.

        Raises InputError where it has changed since.
        """
        path, record = self.directory / name, self._record.files.get(name)
        partial = partial_path(path)
        if not path.is_file():
            if record is None or not partial.is_file() or partial.stat().st_size != record.nbytes:
                return False
            publish(partial, path)
        problem = "was not written by this tool" if record is None else record.problem(path)
        if problem:
            raise InputError(f"{path} {problem}. Move it away, or give another --out.")
        return True

    def add(self, files: Mapping[str, FileRecord], state: Any = None) -> None:
        """Put down what these files hold, before they get their names; ``state`` is kept for a later run."""
        self._record = replace(self._record.with_files(files), state=state)
        self._record.write(self.directory / IN_PROGRESS)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file whole; ``name`` may have a folder before it."""
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        # The record comes before the name, as with large files: what has the name without it is somebody else's.
        write_partial(path, content)
        self.add({name: FileRecord(len(content), hashlib.sha256(content).hexdigest())}, self._record.state)
        publish(partial_path(path), path)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole, with a stable order and a final newline."""
        self.write(name, json_bytes(value, indent=1))

    def check_sources(self) -> None:
        """Raise InputError where a file of the source has changed since the directory was claimed."""
        for path in self._sources:
            now = stamp_files([path], changes=True) if path.exists() else {}
            if now.get(path.name) == self._stamps[path.name]:
                continue
            again = "the same command again"
            if self.state is not State.EMPTY:  # what an earlier run made stays, and no rerun may go on with it
                again += " with --force"
                self._record = replace(self._record, sources={})
                self._record.write(self.directory / IN_PROGRESS)
            raise InputError(f"{path} changed while it was read. Run {again} when nothing writes it.")

    def finish(self) -> None:
        """Put down that the directory is whole."""
        missing = set(self._record.wanted) - self._record.files.keys()
        if missing:
            raise ValueError(f"{self.directory}: {sorted(missing)} were announced and not written")
        if self._recorded:
            record = replace(self._record, wanted=tuple(sorted(self._record.files)), replaced=())
            record.write(self.directory / WRITTEN)
        # In this order: a kill in between leaves a journal by which the rerun sees that nothing is left to do.
        (self.directory / IN_PROGRESS).unlink(missing_ok=True)
        remove(self.directory, ())


@contextmanager
def claim(
    wanted: Wanted, finished: Callable[[Path], Finished | None], check_room: Callable[[int], None], force: bool
) -> Iterator[Output]:
    """Hold a directory for one process while it is filled.

    ``finished`` reads a directory that an earlier version finished (None: it didn't; InputError: it did, and is
    damaged). ``check_room`` is told the bytes of these files that are there already or will be removed, and raises
    InputError where the rest has no room; nothing has been written or removed then. The caller writes the finishing
    file last; leaving with an exception keeps what there is for a rerun, unless a rerun could only end the same way:
    InputError in a directory that was empty leaves nothing. Raises InputError where the directory holds something else
    and ``force`` is off, or files that these tools never wrote, or another process is filling it.
    """
    out = wanted.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Give --out a directory.")
    found = _look(wanted, finished, force)
    if found.state is State.FINISHED:
        _tidy(out)
        yield Output(wanted, found)
        return
    ours = {*found.record.wanted, *found.record.replaced}
    check_room(existing_bytes(out, (name for name in ours if name.endswith(".safetensors"))))
    with _directory(out), lock(out):
        found = _look(wanted, finished, force)  # once more: another process may have been here
        if found.state is State.FINISHED:
            yield Output(wanted, found)
            return
        output = Output(wanted, found._replace(record=_begin(out, found.record)))
        try:
            yield output
        except InputError:
            if found.state is State.EMPTY:
                remove(out, output.files, unfinished=found.record.wanted)
                (out / IN_PROGRESS).unlink(missing_ok=True)
            raise
        output.finish()


def _tidy(out: Path) -> None:
    """Remove what a run that was killed in its last moment left beside its finished output."""
    left = [name for name in (LOCK, JOURNAL, *(own + PARTIAL_SUFFIX for own in _OWN)) if (out / name).exists()]
    if left:
        with suppress(OSError, InputError), lock(out):  # on a disk for reading only, or while another process is here
            remove(out, ())
            for name in (IN_PROGRESS, WRITTEN):
                partial_path(out / name).unlink(missing_ok=True)


def _begin(out: Path, record: Record) -> Record:
    """Put down what is begun, then remove what it replaces: a kill in between leaves what the next run needs."""
    record.write(out / IN_PROGRESS)
    if not record.replaced:
        return record
    (out / WRITTEN).unlink(missing_ok=True)
    remove(out, record.replaced)
    record = replace(record, replaced=())
    record.write(out / IN_PROGRESS)
    return record


def is_complete(wanted: Wanted, finished: Callable[[Path], Finished | None]) -> bool:
    """Whether the directory is there as it was written."""
    try:
        return _look(wanted, finished, force=False).state is State.FINISHED
    except InputError:
        return False


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


def recorded_names(out: Path, arguments: dict[str, Any], finished: Callable[[Path], Finished | None]) -> frozenset[str]:
    """The files that a run with these arguments has written or begun in ``out``; none where there was no such run."""
    earlier: Record | Finished | None = None
    with suppress(InputError):  # claim tells what is wrong there
        names = [name for name in (IN_PROGRESS, WRITTEN) if (out / name).is_file()]
        earlier = read_record(out / names[0]) if names else finished(out)
    if earlier is None or as_stored(earlier.arguments) != as_stored(arguments):
        return frozenset()
    return frozenset(earlier.files) if isinstance(earlier, Finished) else earlier.names


class _Found(NamedTuple):
    """How a directory was found, the record to begin with, and the names of files there that these tools wrote."""

    state: State
    record: Record
    mine: frozenset[str] = frozenset()


def _look(wanted: Wanted, finished: Callable[[Path], Finished | None], force: bool) -> _Found:
    """What to do with the directory, which is only looked at. Raises InputError where it has to be left alone."""
    out, begun = wanted.out, wanted.record()
    if (out / IN_PROGRESS).exists():
        found = _look_at_unfinished(out, begun, force)
    elif (out / WRITTEN).exists():
        found = _look_at_written(out, begun, force)
    else:
        found = _look_at_unrecorded(out, begun, finished, force)
    if found.state is not State.FINISHED:
        _check_foreign(out, found)
    return found


def _look_at_unfinished(out: Path, begun: Record, force: bool) -> _Found:
    record = read_record(out / IN_PROGRESS)
    if record.same_run(begun):
        return _Found(State.UNFINISHED, _as_left(out, record), frozenset(record.files) | set(record.replaced))
    _check_command(out, record, begun)
    if not record.same_output(begun):
        return _replace(out, f"was begun with {_difference(record, begun)}", begun, record.names, force)
    if not force:
        raise _refusal(out, f"was begun for other files ({_shown(set(record.wanted) - set(begun.wanted))})")
    return _keep_whole(begun, record, {name: file for name, file in record.files.items() if (out / name).is_file()})


def _look_at_written(out: Path, begun: Record, force: bool) -> _Found:
    record = read_record(out / WRITTEN)
    _check_command(out, record, begun)
    if not record.same_output(begun):
        return _replace(out, f"was made with {_difference(record, begun)}", begun, record.names, force)
    present = {name: file for name, file in record.files.items() if (out / name).is_file()}
    problems = {name: problem for name, file in present.items() if (problem := file.problem(out / name))}
    if force:
        return _keep_whole(begun, record, {name: file for name, file in present.items() if name not in problems})
    for name, problem in problems.items():
        raise InputError(f"{out / name} {problem}. Give --force to make it anew, or another --out.")
    if present.keys() >= set(begun.wanted):
        return _Found(State.FINISHED, record, record.names)
    return _Found(State.UNFINISHED, replace(begun, files=present, state=record.state), record.names)


def _look_at_unrecorded(out: Path, begun: Record, finished: Callable[[Path], Finished | None], force: bool) -> _Found:
    """A directory that isn't there, is empty, of somebody else, a seed, or of a version that kept no record."""
    entries = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if JOURNAL in entries:  # ours is never without a record
        raise InputError(f"{out / JOURNAL} {_KEPT}")
    if entries <= {LOCK, LOCK + PARTIAL_SUFFIX, IN_PROGRESS + PARTIAL_SUFFIX}:
        return _Found(State.EMPTY, begun)
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
    return _Found(State.FINISHED, begun)


def _check_command(out: Path, record: Record, begun: Record) -> None:
    if record.command != begun.command:
        raise InputError(
            f"{out} was written by {record.command}, and --force keeps it: it replaces only what the same command "
            "wrote. Give another --out."
        )


def _as_left(out: Path, record: Record) -> Record:
    """An unfinished run's record without the files that are gone. Raises InputError for one that has changed since."""
    there = {}
    for name, file in record.files.items():
        path, partial = out / name, partial_path(out / name)
        if path.is_file():
            # A file that was about to be replaced, by the one that lies beside it, is no changed one.
            problem = file.problem(path)
            if problem and not (partial.is_file() and not file.problem(partial)):
                raise InputError(f"{path} {problem}. Move it away, or give another --out.")
        if path.is_file() or partial.is_file() or name in record.wanted:
            there[name] = file
    return replace(record, files=there)


def _replace(out: Path, problem: str, begun: Record, mine: frozenset[str], force: bool) -> _Found:
    """Begin anew in the place of ``mine``, where ``force`` allows it; else InputError with the problem."""
    if not force:
        raise _refusal(out, problem)
    for path in sorted(out.iterdir()):
        if not mine and _MODEL.fullmatch(path.name):
            raise InputError(f"{path} {_KEPT}")
    return _Found(State.EMPTY, replace(begun, replaced=tuple(sorted(mine))), mine)


def _keep_whole(begun: Record, record: Record, whole: Mapping[str, FileRecord]) -> _Found:
    """Make the wanted files anew, and keep the others of the same output that are ``whole``."""
    kept = {name: file for name, file in whole.items() if name not in begun.wanted}
    replaced = tuple(sorted(record.names - kept.keys()))
    state = State.UNFINISHED if kept else State.EMPTY
    return _Found(
        state, replace(begun, files=kept, replaced=replaced, state=record.state if kept else None), record.names
    )


def _check_foreign(out: Path, found: _Found) -> None:
    """Raise InputError where a file that these tools didn't write has the name of one that is to be written."""
    for name in found.record.wanted:
        path, partial = out / name, partial_path(out / name)
        if os.path.lexists(path) and (name not in found.mine or path.is_dir()):
            raise InputError(f"{path} {_KEPT}")
        if os.path.lexists(partial) and name not in found.mine and found.state is not State.UNFINISHED:
            raise InputError(f"{partial} {_KEPT}")
    for name in _SINGLE_FILES:  # readers take it for the model, whatever stands beside it
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


@contextmanager
def _directory(out: Path) -> Iterator[None]:
    """``out`` with its parents, made where they are missing, and gone again where an InputError leaves them empty."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except InputError:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise
