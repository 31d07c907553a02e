"""A file of tensors written front to back: a header, then the values as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.files.file_system import sync_file
from converters.files.streams import StreamWriter, chunk_bytes
from converters.files.whole import FileRecord, partial_path, publish

if TYPE_CHECKING:
    import torch

_BUFFER_BYTES = 1 << 20


def tensors_before(begin: int, sizes: Sequence[int], position: int) -> int | None:
    """How many tensors of these bytes, the first at byte ``begin`` of a file, end at or before byte ``position``.

    None where none ends just there.
    """
    end = begin
    for count, size in enumerate(sizes):
        if end >= position:
            return count if end == position else None
        end += size
    return len(sizes) if end == position else None


class TensorWriter:
    """A file written block by block; it gets its name only by ``publish``.

    ``append`` takes the values of the tensors one after another, in any number of blocks; ``end_tensor`` is called
    after each tensor. ``nbytes`` counts the bytes written so far, the header included.
    """

    def __init__(self, path: Path, header: bytes, nbytes: int, resume_at: int = 0, files: int = 1) -> None:
        """``nbytes`` is the size of the whole file. With ``resume_at``, continue an unfinished file from that byte, up
        to which it was flushed to the disk.

        ``files`` is the number of files that are being written at once. Raises OSError where the file can't be opened.
        """
        self._path = path
        self._partial = partial_path(path)
        self._digest = hashlib.sha256()
        self._expected = nbytes
        self.nbytes = 0
        if resume_at:
            self._skip(resume_at)
        self._file = StreamWriter(self._partial, resume_at, chunk_bytes(files))
        if not resume_at:
            self._write(header)

    def append(self, block: torch.Tensor) -> None:
        """Write the next values: a tensor on the host, of any shape and of the dtype that the header states."""
        import torch

        self._write(memoryview(block.contiguous().view(-1).view(torch.uint8).numpy()))

    def end_tensor(self) -> None:
        """Write what the format has between two tensors: here nothing."""

    def flush(self) -> int:
        """Hand what is written to the system. Returns a file descriptor to fsync."""
        return self._file.flush()

    def finish(self) -> FileRecord:
        """Flush the file to the disk and close it. Raises ValueError where values are missing."""
        if self.nbytes != self._expected:
            raise ValueError(f"{self._path.name}: {self.nbytes} bytes written of {self._expected} announced")
        sync_file(self.flush())
        self._file.close()
        return FileRecord(self.nbytes, self._digest.hexdigest())

    def publish(self) -> None:
        """Give the finished file its name."""
        publish(self._partial, self._path)

    def stop(self) -> None:
        """Close the file as it is: unfinished, and under its temporary name, for a later run to continue."""
        self._file.close()

    def _skip(self, count: int) -> None:
        """Take the digest of the first ``count`` bytes, and go on behind them."""
        with self._partial.open("rb") as file:
            while file.tell() < count:
                self._digest.update(file.read(min(_BUFFER_BYTES, count - file.tell())))
        self.nbytes = count

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.nbytes += len(data)
