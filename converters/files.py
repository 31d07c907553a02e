"""Files that appear whole or not at all, and safetensors files written as their values come."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.streams import StreamWriter, chunk_bytes

if TYPE_CHECKING:
    import torch

PARTIAL_SUFFIX = ".partial"
_BUFFER_BYTES = 1 << 20
# torch's dtype names -> the codes of the safetensors format, with bytes per element.
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8"}
DTYPE_NAMES = {code: name for name, code in CODES.items()}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1}


def partial_path(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file under a temporary name, flush it to the disk, then give it its name."""
    partial = partial_path(path)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    publish(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, with a stable order and a final newline."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def publish(partial: Path, path: Path) -> None:
    """Give a finished, flushed file its final name, and make the name itself survive a power cut."""
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@dataclass(frozen=True)
class TensorSpec:
    """One entry of a safetensors header; ``code`` is the format's dtype code."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.code]


def safetensors_header(tensors: Sequence[TensorSpec]) -> bytes:
    """The length prefix and JSON header of a safetensors file that holds ``tensors`` in this order.

    Format: https://github.com/huggingface/safetensors (README, "Format"). Padded so that the values start at a
    multiple of 64 bytes. ``{"format": "pt"}`` is what transformers asks for.
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
    """A safetensors file written front to back, block by block; it has its name only once ``close`` has returned.

    ``append`` takes the values of the header's tensors one after another, in any number of blocks. With ``resume_at``
    an unfinished file is continued from that byte, which ``sync`` has once flushed to the disk. ``nbytes`` counts what
    is written; with ``hashed``, ``sha256`` is the digest of that.
    """

    def __init__(
        self, path: Path, tensors: Sequence[TensorSpec], resume_at: int = 0, hashed: bool = False, files: int = 1
    ) -> None:
        """``files`` is the number of files that are being written at once."""
        self._path = path
        self._partial = partial_path(path)
        self._digest = hashlib.sha256() if hashed else None
        self._expected = safetensors_bytes(tensors)
        self.nbytes = 0
        if resume_at:
            self._skip(resume_at)
        self._file = StreamWriter(self._partial, resume_at, chunk_bytes(files))
        if not resume_at:
            self._write(safetensors_header(tensors))

    def append(self, block: torch.Tensor) -> None:
        """Write the next values, given as a host tensor of the dtype that the header states."""
        import torch

        self._write(memoryview(block.contiguous().view(-1).view(torch.uint8).numpy()))

    def flush(self) -> int:
        """Hand what is written to the system. Returns a file descriptor to fsync."""
        return self._file.flush()

    def close(self) -> None:
        """Flush the file to the disk and give it its name. Raises ValueError where values are missing."""
        if self.nbytes != self._expected:
            raise ValueError(f"{self._path.name}: {self.nbytes} bytes written of {self._expected} announced")
        os.fsync(self.flush())
        self._file.close()
        publish(self._partial, self._path)

    def stop(self) -> None:
        """Close the file as it is, unfinished and without its name, for a later run to continue."""
        self._file.close()

    @property
    def sha256(self) -> str:
        if self._digest is None:
            raise ValueError(f"{self._path.name} is written without a digest")
        return self._digest.hexdigest()

    def _skip(self, count: int) -> None:
        """Stand behind the first ``count`` bytes, with their digest taken."""
        if self._digest is not None:
            with self._partial.open("rb") as file:
                while file.tell() < count:
                    self._digest.update(file.read(min(_BUFFER_BYTES, count - file.tell())))
        self.nbytes = count

    def _write(self, data: bytes | memoryview) -> None:
        if self._digest is not None:
            self._digest.update(data)
        self._file.write(data)
        self.nbytes += len(data)
