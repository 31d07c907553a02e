"""The header of a GGUF file (llama.cpp's format, versions 2 and 3): checked against the file, and read with types."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from converters.console.errors import DuplicateTensor, InputError, shown

# The header's value types by number, with the bytes of a scalar; strings and arrays are stored with their length.
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
# Far above what vocabularies need (LLaMA 3's with its merges: 600,000 items, 8 MB), and still quick to read.
_MAX_ITEMS = 1 << 21  # pairs of metadata, array elements and tensors
_MAX_HEADER_BYTES = 1 << 28
_MAX_AXES = 4
_DEFAULT_ALIGNMENT = 32
_ABSENT = object()


@dataclass(frozen=True)
class Metadata:
    """The key-value pairs of a GGUF file's header, read with their types checked.

    For a missing key each method returns ``default``, or without one raises InputError. It also raises InputError for a
    value of another type.
    """

    path: Path
    values: dict[str, Any]

    def key(self, name: str) -> str:
        """The key of a property of the model: such begin with its architecture."""
        return f"{self.text('general.architecture')}.{name}"

    def whole(self, key: str, default: Any = _ABSENT) -> Any:
        return self._get(key, (int,), "a whole number", default)

    def number(self, key: str, default: Any = _ABSENT) -> Any:
        return self._get(key, (int, float), "a number", default)

    def flag(self, key: str, default: Any = _ABSENT) -> Any:
        return self._get(key, (bool,), "true or false", default)

    def text(self, key: str, default: Any = _ABSENT) -> Any:
        return self._get(key, (str,), "a text", default)

    def array(self, key: str, of: tuple[type, ...], length: int | None = None, default: Any = _ABSENT) -> Any:
        value = self._get(key, (list,), "an array", default)
        if value is default:
            return value
        if not all(type(item) in of for item in value):
            raise InputError(f"{self.path} holds values of the wrong type in {key}; give another file of the model.")
        if length is not None and len(value) != length:
            raise InputError(
                f"{self.path} holds {len(value)} values in {key} for {length} tokens; give another file of the model."
            )
        return value

    def _get(self, key: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is _ABSENT:
            raise InputError(f"{self.path} lacks the metadata key {key}, which a LLaMA model needs.")
        if value is default or type(value) in kinds:
            return value
        raise InputError(f"{self.path} has {shown(value)} for the metadata key {key}; it must be {what}.")


def damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not a readable GGUF file: {why}; fetch it again, or give another file of the model.")


class _Tensor(NamedTuple):
    """A row of the header's tensor table; ``offset`` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def check_header(path: Path) -> None:
    """Check the header before the library reads it, which trusts every count and would loop for years on a large one.

    Raises InputError for a file that is missing, unreadable, damaged or of another version.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    try:
        with path.open("rb") as file:
            head = file.read(24)
            if head[:4] != b"GGUF":
                raise InputError(f"{path} is not a GGUF file: it doesn't start with 'GGUF'.")
            if len(head) < 24:
                raise damaged(path, "it ends within its header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Walk(path, data).check()
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}.") from None


class _Walk:
    """A position in the header that moves neither past the end of the file nor past _MAX_ITEMS items."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._size = path, data, len(data)
        self._at, self._items = 4, 0
        self._alignment = _DEFAULT_ALIGNMENT

    def check(self) -> None:
        """Raises InputError where the version, a count, a length or a tensor's position can't be right."""
        version = self._number("<I")
        if version & 0xFFFF == 0:
            raise InputError(f"{self._path} is a big-endian GGUF file; make it little-endian with gguf-convert-endian.")
        if version not in (2, 3):
            raise InputError(f"{self._path} is of GGUF version {version}; this tool reads versions 2 and 3.")
        tensors, pairs = self._number("<Q"), self._number("<Q")
        self._each(pairs, self._pair)
        table: dict[str, _Tensor] = {}
        self._each(tensors, lambda: self._tensor(table))
        self._check_places(list(table.values()))

    def _each(self, count: int, step: Callable[[], object]) -> None:
        self._count(count)
        for _ in range(count):
            step()

    def _count(self, items: int) -> None:
        self._items += items
        if self._items > _MAX_ITEMS:
            raise damaged(self._path, f"its header holds more than {_MAX_ITEMS} items")

    def _skip(self, length: int) -> int:
        """Move past ``length`` bytes and return where they start."""
        start = self._at
        self._at += length
        if self._at > self._size:
            raise damaged(self._path, "it ends within its header")
        if self._at > _MAX_HEADER_BYTES:
            raise damaged(self._path, f"its header takes more than {_MAX_HEADER_BYTES >> 20} MiB")
        return start

    def _number(self, form: str) -> int:
        return struct.unpack_from(form, self._data, self._skip(struct.calcsize(form)))[0]

    def _text(self) -> str:
        length = self._number("<Q")
        start = self._skip(length)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            raise damaged(self._path, "a name in its header is not UTF-8") from None

    def _pair(self) -> None:
        key, kind = self._text(), self._number("<I")
        start = self._at
        self._value(kind)
        if key == "general.alignment" and kind == _UINT32:
            (self._alignment,) = struct.unpack_from("<I", self._data, start)

    def _value(self, kind: int) -> None:
        if kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY:
            element, count = self._number("<I"), self._number("<Q")
            if element in _SCALAR_BYTES:
                self._count(count)
                self._skip(count * _SCALAR_BYTES[element])
            elif element == _STRING:
                self._each(count, lambda: self._value(_STRING))
            else:
                raise damaged(self._path, f"it holds an array of values of type {element}")
        else:
            raise damaged(self._path, f"it holds a value of unknown type {kind}")

    def _tensor(self, table: dict[str, _Tensor]) -> None:
        name, axes = self._text(), self._number("<I")
        if axes > _MAX_AXES:
            raise damaged(self._path, f"its tensor {name!r} has {axes} axes")
        shape = tuple(self._number("<Q") for _ in range(axes))
        if name in table:
            raise DuplicateTensor(f"{self._path} holds the tensor {name!r} twice.")
        table[name] = _Tensor(name, shape, self._number("<I"), self._number("<Q"))

    def _check_places(self, tensors: list[_Tensor]) -> None:
        """The format puts each tensor's data right after the one before it, padded to the alignment."""
        if self._alignment < 1:
            raise damaged(self._path, "its alignment is 0")
        start, end = -(-self._at // self._alignment) * self._alignment, 0
        for tensor in tensors:
            if tensor.offset != end:
                raise damaged(self._path, f"the data of tensor {tensor.name!r} is not where it belongs")
            end += self._bytes(tensor)
            if start + end > self._size:
                raise damaged(self._path, f"it ends before the data of tensor {tensor.name!r} does")
            end = -(-end // self._alignment) * self._alignment

    def _bytes(self, tensor: _Tensor) -> int:
        from gguf import GGML_QUANT_SIZES

        if tensor.type not in GGML_QUANT_SIZES:
            raise InputError(f"{self._path} holds {tensor.name} in type {tensor.type}, which is unknown.")
        block, size = GGML_QUANT_SIZES[tensor.type]
        if tensor.shape and tensor.shape[0] % block:
            raise damaged(self._path, f"the rows of tensor {tensor.name!r} are no whole number of blocks")
        return math.prod(tensor.shape) // block * size
