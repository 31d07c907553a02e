"""The safetensors format: dtype codes, the header, and a writer that takes values as they come.

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.files.file_system import sync_file
from converters.files.streams import StreamWriter, chunk_bytes
from converters.files.whole import FileRecord, partial_path, publish

if TYPE_CHECKING:
    import torch

_BUFFER_BYTES = 1 << 20
# torch's dtype names -> the codes of the safetensors format, with bytes per element.
CODES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
}
DTYPE_NAMES = {code: name for name, code in CODES.items()}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1}


@dataclass(frozen=True)
class TensorSpec:
    """One entry of a safetensors header; ``code`` is the format's dtype code (``BF16``)."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.code]


def safetensors_header(tensors: Sequence[TensorSpec]) -> bytes:
    """The length prefix and JSON header of a safetensors file that holds ``tensors`` in this order.

    Padded so that the values start at a multiple of 64 bytes. transformers requires ``{"format": "pt"}``.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % 64)
    return len(header).to_bytes(8, "little") + header


def tensors_before(tensors: Sequence[TensorSpec], position: int) -> int | None:
    """How many of ``tensors`` end at or before byte ``position`` of their file; None where none ends just there."""
    end = len(safetensors_header(tensors))
    for count, tensor in enumerate(tensors):
        if end >= position:
            return count if end == position else None
        end += tensor.nbytes
    return len(tensors) if end == position else None


def safetensors_bytes(tensors: Sequence[TensorSpec]) -> int:
    """The size of the file that SafetensorsWriter makes of ``tensors``."""
    return len(safetensors_header(tensors)) + sum(tensor.nbytes for tensor in tensors)


class SafetensorsWriter:
    """A safetensors file written front to back, block by block; it gets its name only by ``publish``.

    ``append`` takes the values of the header's tensors one after another, in any number of blocks. ``nbytes`` counts
    the bytes written so far, the header included.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], resume_at: int = 0, files: int = 1) -> None:
        """With ``resume_at``, continue an unfinished file from that byte, up to which it was flushed to the disk.

        ``files`` is the number of files that are being written at once. Raises OSError where the file can't be opened.
        """
        self._path = path
        self._partial = partial_path(path)
        self._digest = hashlib.sha256()
        self._expected = safetensors_bytes(tensors)
        self.nbytes = 0
        if resume_at:
            self._skip(resume_at)
        self._file = StreamWriter(self._partial, resume_at, chunk_bytes(files))
        if not resume_at:
            self._write(safetensors_header(tensors))

    def append(self, block: torch.Tensor) -> None:
        """Write the next values: a tensor on the host, of any shape and of the dtype that the header states."""
        import torch

        self._write(memoryview(block.contiguous().view(-1).view(torch.uint8).numpy()))

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
