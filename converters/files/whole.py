"""Files that appear whole or not at all, and what one held when it was written."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from converters.files.file_system import sync_file, sync_folder

PARTIAL_SUFFIX = ".partial"
_SMALL_BYTES = 16 << 20  # up to this size a file is checked by its digest, a larger one by its size


def partial_path(path: Path) -> Path:
    """The temporary name of a file until it is whole."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file under its temporary name, flush it to the disk, then rename it."""
    write_partial(path, content)
    publish(partial_path(path), path)


def write_partial(path: Path, content: bytes) -> None:
    """Write a small file under its temporary name and flush it. Raises OSError where a symbolic link has that name."""
    partial = partial_path(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(partial, flags, 0o666), "wb") as file:
        file.write(content)
        file.flush()
        sync_file(file.fileno())


def replace_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a small file whole in a user's folder, under a random temporary name: no other file there is touched.

    ``mode`` is the new file's, less what the process's umask takes away.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{token_hex(4)}{PARTIAL_SUFFIX}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        try:
            file.write(content)
            file.flush()
            sync_file(file.fileno())
            publish(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, as ``json_file`` has it."""
    write_whole(path, json_file(value))


def json_file(value: Any) -> bytes:
    """The content of a JSON file: indented, its keys in the order given, with a final newline."""
    return json_bytes(value, indent=1)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """JSON with a final newline, in UTF-8 whatever the locale.

    A byte of a path that is not valid text (in Python a lone surrogate) becomes JSON's escape of it, ``\\udcXX``.
    """
    return to_utf8(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def to_utf8(text: str) -> bytes:
    """UTF-8, with lone surrogates escaped as ``\\udcXX``."""
    return text.encode("utf-8", "backslashreplace")


def publish(partial: Path, path: Path) -> None:
    """Give a finished, flushed file its final name, and flush the name too."""
    os.replace(partial, path)
    sync_folder(path.parent)


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and hex sha256 of a file as it was written."""

    nbytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return {"bytes": self.nbytes, "sha256": self.sha256}

    def problem(self, path: Path) -> str:
        """In words, how ``path`` differs from what was written; empty where it doesn't.

        Of a large file only the size is checked.
        """
        size = path.stat().st_size
        if size != self.nbytes:
            return f"has changed since it was written ({size} bytes, then {self.nbytes})"
        if size <= _SMALL_BYTES and hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            return "has changed since it was written (its sha256 is another)"
        return ""
