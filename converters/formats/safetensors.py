"""The safetensors format: dtype codes, the header, and a writer that takes values as they come.

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.formats.tensor_writer import TensorWriter

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


def safetensors_bytes(tensors: Sequence[TensorSpec]) -> int:
    """The size of the file that SafetensorsWriter makes of ``tensors``."""
    return len(safetensors_header(tensors)) + sum(tensor.nbytes for tensor in tensors)


class SafetensorsWriter(TensorWriter):
    """A safetensors file written front to back."""

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], resume_at: int = 0, files: int = 1) -> None:
        """As TensorWriter, with these ``tensors``."""
        super().__init__(path, safetensors_header(tensors), safetensors_bytes(tensors), resume_at, files)
