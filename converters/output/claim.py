"""Claiming a directory for one run: recorded before the first byte is written, finished by the file written last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from converters.console.errors import InputError
from converters.files.stamps import Stamp, stamp, stamps
from converters.files.whole import PARTIAL_SUFFIX, FileRecord, partial_path, publish, write_partial
from converters.output.journal import FILE_NAME as JOURNAL
from converters.output.lock import FILE_NAME as LOCK
from converters.output.lock import lock
from converters.output.record import IN_PROGRESS, WRITTEN, Record, as_stored, existing_bytes, remove
from converters.output.state import Finished, Found, State, examine

_OWN = (LOCK, IN_PROGRESS, WRITTEN, JOURNAL)


@dataclass(frozen=True)
class Wanted:
    """What ``command`` is to make: the directory, the arguments that its content follows from, and all its file names.

    ``sources`` are the files that values are read from. ``names`` may be some of an output's files: the others, made
    with the same arguments, then stay. ``recorded`` is false where the last file itself says all there is to know.
    """

    command: str
    out: Path
    arguments: dict[str, Any]
    sources: tuple[Path, ...]
    names: tuple[str, ...]
    recorded: bool = True

    def record(self, sources: Mapping[Path, Stamp]) -> Record:
        """What is known before the first byte; ``sources`` are the stamps of the source's files."""
        sizes_and_times = {path.name: [each.nbytes, each.written_ns] for path, each in sources.items()}
        return Record(self.command, as_stored(self.arguments), sizes_and_times, tuple(sorted(self.names)))


class Output:
    """The directory while this process fills it."""

    def __init__(self, wanted: Wanted, found: Found, sources: Mapping[Path, Stamp]) -> None:
        """``sources`` are the stamps of the source's files from before the directory was looked at."""
        self.state = found.state
        self.directory = wanted.out
        self._recorded = wanted.recorded
        self._sources = sources
        self._record = found.record

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that the content follows from."""
        return self._record.arguments

    @property
    def caller_state(self) -> Any:
        """The state last given to ``add`` by a run with the same arguments."""
        return self._record.state

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """The files that are whole, including those of earlier runs with the same arguments."""
        return self._record.files

    def take_whole(self, name: str) -> bool:
        """Whether a file is there as it was written; one that is whole but was not renamed yet gets its name.

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
        """Record what these files hold, before they get their names; ``state`` is kept for a later run."""
        self._record = replace(self._record.with_files(files), state=state)
        self._record.write(self.directory / IN_PROGRESS)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write small files whole, by name; a name may have a folder before it."""
        records = {name: FileRecord(len(content), sha256(content).hexdigest()) for name, content in files.items()}
        for name, content in files.items():
            path = self.directory / name
            path.parent.mkdir(exist_ok=True)
            if not self._is_left(name, records[name]):
                write_partial(path, content)
        # The record comes before the names, as with large files: a file that has its name without it isn't ours.
        self.add(records, self._record.state)
        for path in (self.directory / name for name in files):
            publish(partial_path(path), path)

    def _is_left(self, name: str, record: FileRecord) -> bool:
        """Whether a killed run recorded this file, and left it whole under its temporary name.

        Then it isn't written again: a second kill while it is would leave neither the old file nor the recorded one.
        """
        partial = partial_path(self.directory / name)
        is_there = self._record.files.get(name) == record and partial.is_file() and not partial.is_symlink()
        return is_there and not record.problem(partial)

    def check_sources(self) -> None:
        """Raise InputError where a file of the source has changed since the directory was claimed."""
        for path, before in self._sources.items():
            if path.exists() and stamp(path) == before:
                continue
            again = "the same command again"
            if self.state is not State.EMPTY:  # what an earlier run made stays, and no rerun may go on with it
                again += " with --force"
                self._record = replace(self._record, sources={})
                self._record.write(self.directory / IN_PROGRESS)
            raise InputError(f"{path} changed while it was read. Run {again} when nothing writes it.")

    def finish(self) -> None:
        """Record that the directory is whole. Raises ValueError where a file of ``Wanted.names`` was not written."""
        missing = set(self._record.wanted) - self._record.files.keys()
        if missing:
            raise ValueError(f"{self.directory}: {sorted(missing)} were announced and not written")
        if self._recorded:
            record = replace(self._record, wanted=tuple(sorted(self._record.files)), replaced=())
            record.write(self.directory / WRITTEN)
        # In this order: after a kill in between, the rerun sees by the journal that nothing is left to do.
        (self.directory / IN_PROGRESS).unlink(missing_ok=True)
        remove(self.directory, ())


@contextmanager
def claim(
    wanted: Wanted, finished: Callable[[Path], Finished | None], check_room: Callable[[int], None], force: bool
) -> Iterator[Output]:
    """Hold a directory for one process while it is filled.

    ``finished`` reads a directory without a record: it returns None where no earlier version of the command finished
    it, and raises InputError where one did and it is damaged. ``check_room`` is given the bytes of this output's files
    that are there already or will be removed; it raises InputError where the rest has no room, before anything has been
    written or removed.

    The caller writes the finishing file last. After an exception, what there is stays for a rerun, unless a rerun could
    only end the same way: InputError in a directory that was empty leaves nothing. Raises InputError where the
    directory holds something else and ``force`` is off, or files that these tools never wrote, or where another process
    is filling it.
    """
    out = wanted.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Give --out a directory.")
    sources = stamps(wanted.sources)
    begun = wanted.record(sources)
    found = examine(out, begun, finished, force)
    if found.state is State.FINISHED:
        _tidy(out)
        yield Output(wanted, found, sources)
        return
    ours = {*found.record.wanted, *found.record.replaced}
    check_room(existing_bytes(out, (name for name in ours if name.endswith(".safetensors"))))
    with _directory(out), lock(out):
        found = examine(out, begun, finished, force)  # again: another process may have been here
        if found.state is State.FINISHED:
            yield Output(wanted, found, sources)
            return
        output = Output(wanted, found._replace(record=_begin(out, found.record)), sources)
        try:
            yield output
        except InputError:
            if found.state is State.EMPTY:
                remove(out, output.files, unfinished=found.record.wanted)
                (out / IN_PROGRESS).unlink(missing_ok=True)
            raise
        output.finish()


def is_complete(wanted: Wanted, finished: Callable[[Path], Finished | None]) -> bool:
    """Whether the directory holds everything wanted, as it was written; ``finished`` as for ``claim``."""
    try:
        return examine(wanted.out, wanted.record(stamps(wanted.sources)), finished, force=False).state is State.FINISHED
    except InputError:
        return False


def _tidy(out: Path) -> None:
    """Remove what a run that was killed at its very end left beside its finished output."""
    left = [name for name in (LOCK, JOURNAL, *(own + PARTIAL_SUFFIX for own in _OWN)) if (out / name).exists()]
    if left:
        with suppress(OSError, InputError), lock(out):  # a read-only disk, or another process is here
            remove(out, ())
            for name in (IN_PROGRESS, WRITTEN):
                partial_path(out / name).unlink(missing_ok=True)


def _begin(out: Path, record: Record) -> Record:
    """Record what is begun, then remove what it replaces: a kill in between leaves what the next run needs."""
    record.write(out / IN_PROGRESS)
    if not record.replaced:
        return record
    (out / WRITTEN).unlink(missing_ok=True)
    remove(out, record.replaced)
    record = replace(record, replaced=())
    record.write(out / IN_PROGRESS)
    return record


@contextmanager
def _directory(out: Path) -> Iterator[None]:
    """Make ``out`` and its missing parents; remove those again where an InputError leaves them empty."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except InputError:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise
