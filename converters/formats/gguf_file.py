"""Writing a GGUF file (version 3): its header, and the tensors after it as they come.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.formats.safetensors import TensorSpec
from converters.formats.tensor_writer import TensorWriter, tensors_before

_VERSION = 3
ALIGNMENT = 32  # the format's default, so that no key says it
# The types that are written, with how many elements and bytes a block has.
_BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18)}


@dataclass(frozen=True)
class GGUFSpec:
    """A row of the header's tensor table: ``type`` by the format's name, ``shape`` in torch's order of axes."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def values(self) -> TensorSpec:
        """What is written of it: elements of a floating dtype, or rows of blocks as bytes."""
        elements, nbytes = _BLOCKS[self.type]
        if elements == 1:
            return TensorSpec(self.name, self.type, self.shape)
        return TensorSpec(self.name, "U8", (self.shape[0], self.shape[1] // elements * nbytes))

    @property
    def padded_bytes(self) -> int:
        """Up to where the next tensor begins."""
        return _aligned(self.values.nbytes)


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file to write: its name, its metadata in order, and its tensors.

    Values of the metadata are texts, booleans, whole numbers (32 bits, from 0 on), floats (float32), and lists of
    these.
    """

    name: str
    metadata: Mapping[str, Any]
    tensors: tuple[GGUFSpec, ...]

    @cached_property
    def header(self) -> bytes:
        """Everything before the first tensor's values."""
        begin = b"GGUF" + struct.pack("<IQQ", _VERSION, len(self.tensors), len(self.metadata))
        pairs = b"".join(_text(key) + _typed(value) for key, value in self.metadata.items())
        table, offset = [], 0
        for tensor in self.tensors:
            table.append(_table_row(tensor, offset))
            offset += tensor.padded_bytes
        header = begin + pairs + b"".join(table)
        return header + bytes(_aligned(len(header)) - len(header))

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(tensor.values for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.padded_bytes for tensor in self.tensors)

    def tensors_before(self, position: int) -> int | None:
        return tensors_before(len(self.header), [tensor.padded_bytes for tensor in self.tensors], position)

    def writer(self, directory: Path, resume_at: int) -> GGUFWriter:
        return GGUFWriter(directory / self.name, self, resume_at)


class GGUFWriter(TensorWriter):
    """A GGUF file written front to back."""

    def __init__(self, path: Path, file: GGUFFile, resume_at: int = 0) -> None:
        super().__init__(path, file.header, file.nbytes, resume_at)

    def end_tensor(self) -> None:
        self._write(bytes(_aligned(self.nbytes) - self.nbytes))


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    content = value.encode("utf-8", "backslashreplace")
    return struct.pack("<Q", len(content)) + content


def _typed(value: Any) -> bytes:
    """A value after the number of its type; a list's elements are all of the first one's."""
    from gguf import GGUFValueType

    if isinstance(value, list):
        kind = _kind(value[0], in_list=True)
        elements = b"".join(_plain(kind, each) for each in value)
        return struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType[kind], len(value)) + elements
    kind = _kind(value)
    return struct.pack("<I", GGUFValueType[kind]) + _plain(kind, value)


def _kind(value: Any, in_list: bool = False) -> str:
    """The format's type for a value of Python. Lists of whole numbers are signed: types of tokens are."""
    whole = "INT32" if in_list else "UINT32"
    return {str: "STRING", bool: "BOOL", int: whole, float: "FLOAT32"}[type(value)]


def _plain(kind: str, value: Any) -> bytes:
    if kind == "STRING":
        return _text(value)
    return struct.pack({"BOOL": "<?", "INT32": "<i", "UINT32": "<I", "FLOAT32": "<f"}[kind], value)


def _table_row(tensor: GGUFSpec, offset: int) -> bytes:
    from gguf import GGMLQuantizationType

    axes = tensor.shape[::-1]
    numbers = struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, GGMLQuantizationType[tensor.type], offset)
    return _text(tensor.name) + numbers
