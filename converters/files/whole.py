"""Files that appear whole or not at all, and safetensors files written as their values come."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from converters.files.file_system import sync_file, sync_folder
from converters.files.streams import StreamWriter, chunk_bytes

if TYPE_CHECKING:
    import torch

PARTIAL_SUFFIX = ".partial"
_BUFFER_BYTES = 1 << 20
_SMALL_BYTES = 16 << 20  # files up to this size are held against their digest, where larger ones are by their size
# torch's dtype names -> the codes of the safetensors format, with bytes per element.
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8"}
DTYPE_NAMES = {code: name for name, code in CODES.items()}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1}


def partial_path(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file under a temporary name, flush it to the disk, then give it its name."""
    write_partial(path, content)
    publish(partial_path(path), path)


def write_partial(path: Path, content: bytes) -> None:
    """Write a small file under its temporary name and flush it; a symbolic link there is not followed (OSError)."""
    partial = partial_path(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(partial, flags, 0o666), "wb") as file:
        file.write(content)
        file.flush()
        sync_file(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file whole in a folder of the user's, where any name may be taken but the one that was given."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{token_hex(4)}{PARTIAL_SUFFIX}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
        try:
            file.write(content)
            file.flush()
            sync_file(file.fileno())
            publish(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, with a stable order and a final newline."""
    write_whole(path, json_bytes(value, indent=1))


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """JSON with a final newline, in UTF-8 whatever the locale.

    A byte of a path that is no character (a lone surrogate in Python) becomes JSON's escape of it, ``\\udcXX``.
    """
    return to_utf8(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def to_utf8(text: str) -> bytes:
    """UTF-8, in which lone surrogates stand as ``\\udcXX``."""
    return text.encode("utf-8", "backslashreplace")


def publish(partial: Path, path: Path) -> None:
    """Give a finished, flushed file its final name, and make the name itself survive a power cut."""
    os.replace(partial, path)
    sync_folder(path.parent)


@dataclass(frozen=True)
class FileRecord:
    """Size and hex sha256 of a file as it was written."""

    nbytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return {"bytes": self.nbytes, "sha256": self.sha256}

    def problem(self, path: Path) -> str:
        """In words, how ``path`` differs from what was written; empty where it doesn't.

        A large file is held against its size alone.
        """
        size = path.stat().st_size
        if size != self.nbytes:
            return f"has changed since it was written ({size} bytes, then {self.nbytes})"
        if size <= _SMALL_BYTES and hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            return "has changed since it was written (its sha256 is another)"
        return ""


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
    """A safetensors file written front to back, block by block; it has its name only once ``publish`` has returned.

    ``append`` takes the values of the header's tensors one after another, in any number of blocks. With ``resume_at``
    an unfinished file is continued from that byte, up to which it has once been flushed to the disk. ``nbytes`` counts
    what is written, ``sha256`` is the digest of that.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], resume_at: int = 0, files: int = 1) -> None:
        """``files`` is the number of files that are being written at once."""
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
        """Write the next values, given as a host tensor of the dtype that the header states."""
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
        """Close the file as it is, unfinished and without its name, for a later run to continue."""
        self._file.close()

    def _skip(self, count: int) -> None:
        """Stand behind the first ``count`` bytes, with their digest taken."""
        with self._partial.open("rb") as file:
            while file.tell() < count:
                self._digest.update(file.read(min(_BUFFER_BYTES, count - file.tell())))
        self.nbytes = count

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.nbytes += len(data)
