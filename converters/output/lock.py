"""One process at a time in an output directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.console.errors import InputError
from converters.files import file_system
from converters.files.whole import PARTIAL_SUFFIX

FILE_NAME = ".lock"
_CONTENT = b"A command of llama-tpu-toolchain is writing here, or was ended while it did.\n"


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold ``out`` by an advisory lock on a file in it, which the operating system releases when the process ends.

    An existing file of that name is not followed, changed or removed, unless a process of ours left it. Raises
    InputError where another process holds the lock, or where something else has that name.
    """
    path = out / FILE_NAME
    descriptor = _open(path)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path} is no file of this tool. Move it away, or give another --out.")
        held = file_system.lock(descriptor) and path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        if not held:  # or its holder has just ended and removed the file
            raise _busy(out)
        try:
            yield
        finally:
            if os.pread(descriptor, len(_CONTENT) + 1, 0) == _CONTENT:
                os.unlink(path)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """A descriptor of the file; a new one gets its name only once it has its content.

    So a process that is killed on the way leaves no file that could be taken for someone else's.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    _remove_left(partial)
    if os.path.lexists(path):
        return _open_existing(path, flags)
    try:
        descriptor = os.open(partial, flags | os.O_CREAT | os.O_EXCL, 0o666)
        os.write(descriptor, _CONTENT)
        _name(partial, path)
    except (FileExistsError, FileNotFoundError):  # another process is doing the same
        raise _busy(path.parent) from None
    return descriptor


def _name(partial: Path, path: Path) -> None:
    """Rename a file. Raises FileExistsError where something has that name already."""
    try:
        os.link(partial, path)
        os.unlink(partial)
    except FileExistsError:
        os.unlink(partial)
        raise
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        os.rename(partial, path)


def _remove_left(partial: Path) -> None:
    """Remove what was left by a process that was killed while it made its lock."""
    if (
        partial.is_file()
        and not partial.is_symlink()
        and _CONTENT.startswith(partial.read_bytes()[: len(_CONTENT) + 1])
    ):
        partial.unlink(missing_ok=True)


def _open_existing(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NONBLOCK)
    except FileNotFoundError:  # its holder has just ended
        raise _busy(path.parent) from None
    except OSError:
        if path.is_symlink() or not path.is_file():
            raise InputError(f"{path} is no file of this tool. Move it away, or give another --out.") from None
        raise


def _busy(out: Path) -> InputError:
    return InputError(f"Another process is writing to {out}. Wait for it, or give another --out.")
