"""The record of an output directory: the arguments, the source's sizes and times, and every file by size and digest.

It is ``.in-progress.json`` while the directory is being filled, then ``.written.json``. Only what it lists counts as
written by these tools: nothing else is ever removed or overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converters.console.errors import InputError
from converters.files.json_file import read_json
from converters.files.whole import FileRecord, partial_path, write_json
from converters.output.journal import FILE_NAME as JOURNAL

IN_PROGRESS, WRITTEN = ".in-progress.json", ".written.json"
FORMAT_VERSION = 1
_READ_BYTES = 4 << 20
_NAME = re.compile(r"([\w][\w .+-]*/)?[\w][\w .+-]*")  # a file in the directory, or in a folder of it


@dataclass(frozen=True)
class Record:
    """What is known of a directory and of the run that fills it.

    ``sources`` are size in bytes and time of the last write in ns of the source's files, by name. ``wanted`` names the
    files of the run; ``files`` are those that are whole, including earlier runs'. ``replaced`` names the files of the
    output that this one replaces, until they are removed. ``state`` is the caller's own.
    """

    command: str
    arguments: dict[str, Any]
    sources: dict[str, list[int]]
    wanted: tuple[str, ...]
    files: dict[str, FileRecord] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    state: Any = None

    @property
    def names(self) -> frozenset[str]:
        """All files in the directory that these tools have written or were going to write."""
        return frozenset(self.wanted) | self.files.keys() | set(self.replaced)

    def same_output(self, other: Record) -> bool:
        """Whether both have the same command, arguments and source, whichever files they want."""
        return (self.command, self.arguments, self.sources) == (other.command, other.arguments, other.sources)

    def same_run(self, other: Record) -> bool:
        """Whether both also want the same files."""
        return self.same_output(other) and set(self.wanted) == set(other.wanted)

    def with_files(self, files: Mapping[str, FileRecord]) -> Record:
        """The record with these files added or replaced."""
        return replace(self, files=dict(sorted((self.files | files).items())))

    def write(self, path: Path) -> None:
        """Write the record whole, as JSON."""
        content = {
            "format_version": FORMAT_VERSION,
            "command": self.command,
            "arguments": self.arguments,
            "source_files": self.sources,
            "wanted": sorted(self.wanted),
            "files": {name: file.as_json() for name, file in sorted(self.files.items())},
        }
        content |= {"replaced": sorted(self.replaced)} if self.replaced else {}
        content |= {} if self.state is None else {"state": self.state}
        write_json(path, content)


def as_stored(value: Any) -> Any:
    """A value as it comes back from JSON, to compare with one that was read."""
    return json.loads(json.dumps(value))


def read_record(path: Path) -> Record:
    """Read ``.in-progress.json`` or ``.written.json``. Raises InputError where it is damaged or of another version."""
    try:
        content = read_json(path)
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError
        files = {name: read_file_record(entry, path, name) for name, entry in content["files"].items()}
        record = Record(
            str(content["command"]),
            dict(content["arguments"]),
            {name: list(stamp) for name, stamp in content["source_files"].items()},
            tuple(content["wanted"]),
            files,
            tuple(content.get("replaced", ())),
            content.get("state"),
        )
        sound = all(_NAME.fullmatch(name) for name in record.names)
    except (AttributeError, InputError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{path} is damaged, or not of this version of the tool. Move it away, or give another --out.")
    return record


def read_file_record(entry: Any, path: Path, name: str) -> FileRecord:
    """The size and digest of the file ``name``, from an entry of the JSON file ``path``.

    Raises InputError where the entry lacks them.
    """
    nbytes, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(nbytes) is not int or not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(f"{path} has no size and sha256 for {name[:80]}. Make it again with --force.")
    return FileRecord(nbytes, sha256)


def verify_files(
    directory: Path, files: Mapping[str, FileRecord], command: str, advance: Callable[[int], None]
) -> None:
    """Read these files whole. Raises InputError, naming the file, where one is missing or a byte has changed.

    ``advance`` is called with the number of bytes read.
    """
    for name, record in files.items():
        path, digest = directory / name, hashlib.sha256()
        if not path.is_file():
            raise InputError(f"{path} is missing. Run its {command} again: it writes what is missing.")
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                advance(len(block))
        if digest.hexdigest() != record.sha256:
            raise InputError(
                f"{path} has changed since it was written (its sha256 is another). Fetch it again, or run its "
                f"{command} again with --force."
            )


def remove(directory: Path, names: Iterable[str], unfinished: Iterable[str] = ()) -> None:
    """Remove the journal, the files ``names``, whole or not, and those of ``unfinished`` that are not whole.

    Folders that this leaves empty are removed too.
    """
    paths = [directory / name for name in (*names, JOURNAL)]
    for path in (*paths, *map(partial_path, paths), *(partial_path(directory / name) for name in unfinished)):
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in paths} - {directory}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def existing_bytes(directory: Path, names: Iterable[str]) -> int:
    """The bytes that these files take up, whole or not."""
    paths = [directory / name for name in names]
    return sum(path.lstat().st_size for path in (*paths, *map(partial_path, paths)) if os.path.lexists(path))
