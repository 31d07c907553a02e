"""Calls that some file systems lack (locks, flushing, bypassing the page cache), and how a command does without them.

Lustre mounted without ``flock``, older CIFS, FUSE, 9p and object stores answer such calls with various errors. A note
says what was done without. A full, broken or read-only disk is still an error.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from converters.console.notes import note

_ENOTSUPP = 524  # internal to Linux, but NFS returns it; errno has no name for it
_LACKING = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM, _ENOTSUPP}
_LACKING_LOCKS = {*_LACKING, errno.ENOLCK}
# Some want the folder open for writing, which Linux doesn't allow, or don't allow opening it at all.
_LACKING_FOLDERS = {*_LACKING, errno.EBADF, errno.EACCES, errno.EISDIR}
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


def lacks(error: OSError) -> bool:
    """Whether an error says that the file system lacks what was asked for."""
    return error.errno in _LACKING


def lock(descriptor: int) -> bool:
    """Take the advisory lock of an open file, which the operating system releases when the process ends.

    Returns False where another process holds it, and True, with a note, where the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _LACKING_LOCKS:
            raise
        note(f"The file system has no locks (flock: {error.strerror}). Let no other command write to the same folder.")
    return True


def sync_file(descriptor: int) -> None:
    """Flush an open file to the disk. Where the file system can't do that on request, only note it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not lacks(error):
            raise
        note(
            f"The file system doesn't flush files on request (fsync: {error.strerror}). After a power cut, check "
            "what was written."
        )


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk. Where the file system can't do that, only note it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _LACKING_FOLDERS:
            raise
        note(
            f"The file system doesn't flush folders (fsync: {error.strerror}). After a power cut, the newest files may "
            "be missing."
        )


def open_direct(path: Path, flags: int, mode: int = 0o666) -> int:
    """A descriptor that bypasses the page cache; where the file system can't do that, a normal one, with a note.

    Raises OSError where the file can't be opened normally either.
    """
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, flags | direct, mode)
    except OSError as error:
        descriptor = os.open(path, flags, mode)
        if direct:
            note_no_direct(error)
        return descriptor


def note_no_direct(error: OSError) -> None:
    """Note that files go through the page cache."""
    note(f"The file system transfers files through the page cache only (O_DIRECT: {error.strerror}), which is slower.")
