"""The files of a GGUF model: one, or the parts name-0000i-of-0000n.gguf that llama.cpp's tools split it into."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.console.errors import DuplicateTensor, InputError
from converters.files.streams import StreamReader
from converters.formats.gguf_header import Metadata, check_header, damaged

if TYPE_CHECKING:
    import numpy as np

_PART = re.compile(
    r"(?P<model>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>(?:\.gguf)?)", re.DOTALL | re.IGNORECASE
)
_MAX_PARTS = 1000


class GGUFTensor:
    """A tensor in a file. ``type`` is the gguf library's; ``shape`` is in torch's order, the reverse of GGUF's."""

    def __init__(self, file: StreamReader, path: Path, tensor: Any) -> None:
        self.path = path
        self.name: str = tensor.name
        self.shape = tuple(int(length) for length in reversed(tensor.shape))
        self.type = tensor.tensor_type
        self._file = file
        self._offset = int(tensor.data_offset)
        self._dtype, self._raw_shape = tensor.data.dtype, tensor.data.shape

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as stored: uint8 blocks, or float16 or float32 elements; a vector is read whole."""
        import numpy as np

        if len(self._raw_shape) == 1:
            start, stop, row = 0, self._raw_shape[0], ()
        else:
            row = self._raw_shape[1:]
        row_bytes = int(np.prod(row, dtype=np.int64)) * self._dtype.itemsize
        values = self._file.read(self._offset + start * row_bytes, (stop - start) * row_bytes)
        return values.numpy().view(self._dtype).reshape((stop - start, *row))


@dataclass(frozen=True)
class Parts:
    """All files of a model: the first one's metadata, all tensors, and the bytes of all headers."""

    paths: list[Path]
    metadata: Metadata
    tensors: list[GGUFTensor]
    header: bytes


def open_parts(path: Path) -> Parts:
    """Open a GGUF file, or all parts of a split model; ``path`` may be any of them.

    Raises InputError for a damaged file, and for a part that is missing or doesn't belong to the others.
    """
    metadata, tensors, header = _read(path)
    count = metadata.whole("split.count", 1)
    if count <= 1:
        return Parts([path], metadata, tensors, header)
    paths = _names(metadata, count)
    for other in paths:
        if not other.is_file():
            raise InputError(f"{other} is missing; it is a part of the same model as {path.name}. Fetch it.")
    opened = [(metadata, tensors, header) if other == path else _read(other) for other in paths]
    total = opened[0][0].whole("split.tensors.count")
    for number, (each, _, _) in enumerate(opened):
        told = tuple(each.whole(f"split.{key}", None) for key in ("no", "count", "tensors.count"))
        if told != (number, count, total):
            raise InputError(
                f"{each.path} is no part of the same model as {paths[0].name}: its split.no, split.count and "
                f"split.tensors.count are {told}, not {(number, count, total)}. Fetch all parts from one place."
            )
    together = [tensor for _, part, _ in opened for tensor in part]
    _check_tensors(paths, together, total)
    return Parts(paths, opened[0][0], together, b"".join(head for _, _, head in opened))


def first_parts(paths: Iterable[Path]) -> list[Path]:
    """The paths in order, with only the first part of each split model."""
    models: dict[object, Path] = {}
    for path in sorted(paths):
        name = _PART.fullmatch(path.name)
        models.setdefault((name["model"], name["count"]) if name else path, path)
    return list(models.values())


def _names(metadata: Metadata, count: int) -> list[Path]:
    """The paths of all parts, from the name of one."""
    path, number = metadata.path, metadata.whole("split.no")
    name = _PART.fullmatch(path.name)
    if count > _MAX_PARTS or not 0 <= number < count:
        raise damaged(path, f"it says that it is part {number} of {count}, counted from 0")
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        raise InputError(
            f"{path} is part {number + 1} of {count} of a split model; rename it to "
            f"NAME-{number + 1:05d}-of-{count:05d}.gguf, and the others likewise."
        )
    return [path.with_name(f"{name['model']}-{i:05d}-of-{count:05d}{name['suffix']}") for i in range(1, count + 1)]


def _check_tensors(paths: list[Path], tensors: list[GGUFTensor], total: int) -> None:
    holder: dict[str, Path] = {}
    for tensor in tensors:
        if tensor.name in holder:
            raise DuplicateTensor(
                f"The tensor {tensor.name!r} is held twice: by {holder[tensor.name]} and by {tensor.path}."
            )
        holder[tensor.name] = tensor.path
    if len(tensors) != total:
        raise InputError(
            f"{paths[0]} and the other parts hold {len(tensors)} tensors; split.tensors.count says {total}. A part is "
            "of another model: fetch all parts from one place."
        )


def _read(path: Path) -> tuple[Metadata, list[GGUFTensor], bytes]:
    """A file's metadata, tensors and header bytes, checked against the format only."""
    from gguf import GGUFReader

    check_header(path)
    try:
        reader = GGUFReader(path)
        values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        file = StreamReader(path)
        tensors = [GGUFTensor(file, path, tensor) for tensor in reader.tensors]
    except Exception as error:  # the library's parser can raise anything on a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise damaged(path, reason[:100]) from None
    return Metadata(path, values), tensors, reader.data[: reader.data_offset].tobytes()
