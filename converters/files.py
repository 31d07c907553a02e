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

if TYPE_CHECKING:
    import torch

PARTIAL_SUFFIX = ".partial"
# torch's dtype names -> the codes of the safetensors format, with bytes per element.
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8"}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1}


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file under a temporary name, flush it to the disk, then give it its name."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
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


def safetensors_bytes(tensors: Sequence[TensorSpec]) -> int:
    """The size of the file that SafetensorsWriter makes of ``tensors``."""
    return len(safetensors_header(tensors)) + sum(tensor.nbytes for tensor in tensors)


class SafetensorsWriter:
    """A safetensors file written front to back, block by block; it has its name only once ``close`` has returned.

    ``append`` takes the values of the header's tensors one after another, in any number of blocks. ``sha256`` and
    ``nbytes`` describe the finished file.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._file = self._partial.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self.nbytes = 0
        self._expected = safetensors_bytes(tensors)
        self._write(safetensors_header(tensors))

    def append(self, block: torch.Tensor) -> None:
        """Write the next values, given as a contiguous host tensor of the dtype that the header states."""
        import torch

        self._write(memoryview(block.contiguous().view(-1).view(torch.uint8).numpy()))

    def close(self) -> None:
        """Flush the file to the disk and give it its name. Raises ValueError where values are missing."""
        if self.nbytes != self._expected:
            raise ValueError(f"{self._path.name}: {self.nbytes} bytes written of {self._expected} announced")
        os.fsync(self._file.fileno())
        self._file.close()
        publish(self._partial, self._path)

    def abandon(self) -> None:
        """Give the file up, leaving nothing behind."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self.nbytes += len(data)
        rest = memoryview(data)
        while rest:  # an unbuffered write may take less than it was given
            rest = rest[self._file.write(rest) :]
