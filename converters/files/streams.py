"""Long files that are read or written once, bypassing the page cache where the file system allows it (O_DIRECT).

Copying every byte through the page cache, and making room there, costs a conversion more than its arithmetic.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from converters.console.errors import InputError
from converters.files.file_system import lacks, note_no_direct, open_direct

if TYPE_CHECKING:
    import torch

_PAGE = 4096  # O_DIRECT needs offsets, lengths and addresses to be multiples of this
_CHUNK_BYTES = 2 << 20
_BUFFER_BYTES = 256 << 20  # of all files together that are written at once
_WRITERS = 2  # threads, for all files together
_SMALL_BYTES = 64 << 10  # smaller reads are faster through the page cache, which reads ahead


class StreamReader:
    """A file of which each byte is read once. What the page cache already holds is taken from there."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file can't be opened."""
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._may_be_direct = hasattr(os, "O_DIRECT") and hasattr(os, "RWF_NOWAIT")

    @cached_property
    def _direct(self) -> FileIO | None:
        """The file opened to bypass the page cache; None on a file system that can't do that."""
        try:
            return open(self._path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_DIRECT))
        except OSError as error:
            note_no_direct(error)
            return None

    def read(self, offset: int, count: int) -> torch.Tensor:
        """``count`` bytes from ``offset`` on, as uint8 [count]. Raises InputError where the file has become shorter."""
        import torch

        if self._may_be_direct and count >= _SMALL_BYTES and not self._cached(offset + count - 1) and self._direct:
            try:
                return self._read_direct(self._direct.fileno(), offset, count)
            except OSError as error:
                if not lacks(error):
                    raise
                note_no_direct(error)
                self._may_be_direct = False
        values = torch.empty(count, dtype=torch.uint8)
        self._fill(self._file.fileno(), values, offset, count)
        return values

    def values(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A tensor of this dtype and shape from byte ``offset`` on, at any alignment. Raises InputError as ``read``."""
        found = self.read(offset, prod(shape) * dtype.itemsize)
        if found.storage_offset() % dtype.itemsize:
            found = found.clone()
        return found.view(dtype).view(*shape)

    def columns(self, offset: int, shape: Sequence[int], begin: int, end: int) -> torch.Tensor:
        """Bytes [begin, end) of every row of uint8 ``shape`` [rows, bytes of a row] that begins at ``offset``.

        Rows are read one by one through the page cache, or, if they are wanted whole, at once.
        """
        import torch

        rows, row_bytes = shape
        if (begin, end) == (0, row_bytes):
            return self.read(offset, rows * row_bytes).view(rows, row_bytes)
        count, descriptor = end - begin, self._file.fileno()
        values = torch.empty(rows, count, dtype=torch.uint8)
        view = memoryview(values.view(-1).numpy())
        for row in range(rows):
            place = offset + row * row_bytes + begin
            if os.preadv(descriptor, [view[row * count : (row + 1) * count]], place) != count:
                self._fill(descriptor, values[row], place, count)
        return values

    def _read_direct(self, descriptor: int, offset: int, count: int) -> torch.Tensor:
        """Read whole pages into page-aligned memory; the result is a view of the bytes asked for."""
        import torch

        begin = offset // _PAGE * _PAGE
        length = -(-(offset + count - begin) // _PAGE) * _PAGE
        memory = torch.empty(length + _PAGE, dtype=torch.uint8)
        pages = memory[-memory.data_ptr() % _PAGE :][:length]
        self._fill(descriptor, pages, begin, offset + count - begin)
        return pages[offset - begin :][:count]

    def _fill(self, descriptor: int, values: torch.Tensor, offset: int, least: int) -> None:
        """Read from ``offset`` until ``values`` holds at least its first ``least`` bytes."""
        view, done = memoryview(values.numpy()), 0
        while done < least:
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if not count:
                raise InputError(
                    f"{self._path} has become shorter while it was read. Let nothing write to it meanwhile."
                )
            done += count

    def _cached(self, position: int) -> bool:
        """Whether the page cache holds the byte at ``position``."""
        try:
            return os.preadv(self._file.fileno(), [bytearray(1)], position, os.RWF_NOWAIT) == 1
        except OSError:
            return False


class StreamWriter:
    """A file written front to back, in the background."""

    def __init__(self, path: Path, resume_at: int = 0, chunk_bytes: int = _CHUNK_BYTES) -> None:
        """With ``resume_at``, cut an existing file at that byte and continue it. Raises OSError."""
        self._chunk_bytes = chunk_bytes
        # One is filled while the other is written to the disk. Mapped memory is page-aligned.
        self._filling, self._spare = (memoryview(mmap.mmap(-1, chunk_bytes)) for _ in range(2))
        self._writing: Future[None] | None = None
        self._begin = resume_at // _PAGE * _PAGE  # where in the file the buffer being filled begins
        self._filled = resume_at - self._begin
        if resume_at:
            os.truncate(path, resume_at)
            with path.open("rb") as file:
                file.seek(self._begin)
                self._filling[: self._filled] = file.read()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = open_direct(path, flags if resume_at else flags | os.O_TRUNC)

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``. Raises the OSError of this or an earlier write."""
        left = memoryview(data)
        while left:
            count = min(len(left), self._chunk_bytes - self._filled)
            self._filling[self._filled : self._filled + count] = left[:count]
            self._filled += count
            left = left[count:]
            if self._filled == self._chunk_bytes:
                self._wait()
                self._writing = _writers().submit(self._put, self._filling, self._chunk_bytes, self._begin)
                self._filling, self._spare = self._spare, self._filling
                self._begin, self._filled = self._begin + self._chunk_bytes, 0

    def flush(self) -> int:
        """Hand everything written so far to the system. Returns a file descriptor to fsync."""
        self._wait()
        if self._filled:
            # Not a whole page, so through the page cache: a whole one would have to be truncated afterwards.
            direct = _leave_direct(self._descriptor)
            self._put(self._filling, self._filled, self._begin)
            if direct:
                _go_direct(self._descriptor)
        return self._descriptor

    def close(self) -> None:
        """Close the file. What wasn't flushed is lost."""
        if self._descriptor < 0:
            return
        with suppress(OSError):  # of a write that nobody relies on
            self._wait()
        os.close(self._descriptor)
        self._descriptor = -1

    def _wait(self) -> None:
        if self._writing is not None:
            running, self._writing = self._writing, None
            running.result()

    def _put(self, pages: memoryview, count: int, position: int) -> None:
        """Write the first ``count`` bytes of ``pages`` at ``position``; whole pages, where the cache is bypassed."""
        done = 0
        while done < count:
            try:
                done += os.pwrite(self._descriptor, pages[done:count], position + done)
            except OSError as error:
                if not lacks(error) or not _leave_direct(self._descriptor):
                    raise
                note_no_direct(error)


def chunk_bytes(files: int) -> int:
    """The size of a writer's two buffers where ``files`` are written at once: smaller where there are many."""
    return max(_PAGE, min(_CHUNK_BYTES, _BUFFER_BYTES // (2 * files) // _PAGE * _PAGE))


def _leave_direct(descriptor: int) -> bool:
    """Have a file go through the page cache from now on. Returns False where it did already."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)


def _go_direct(descriptor: int) -> None:
    """Have a file bypass the page cache again."""
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)


@cache
def _writers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_WRITERS)
