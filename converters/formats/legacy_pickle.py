"""Files of torch.save in the format before its zip format: their tensors are mapped, not read.

Such a file is five pickles (a magic number, the format's version, the machine's sizes, the object, the keys of its
storages), then the storages in the order of the keys, each after its number of elements. torch.load reads that but
can't map it. Here torch's own unpickler for weights_only=True unpickles the object with empty storages, and the
positions of the values follow from the storages' sizes.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    import torch

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_ZIP = b"PK"
_COUNT = struct.Struct("<q")


class _Storage(NamedTuple):
    """A storage of the file: ``empty`` stands for it while the object is unpickled."""

    empty: torch.UntypedStorage
    dtype: torch.dtype
    elements: int


def is_zip(path: Path) -> bool:
    """Whether a file is of torch.save's zip format. Raises OSError where it can't be read."""
    with path.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def check_byte_order(path: Path) -> None:
    """Raise ValueError where a zip file says that its values have the other byte order: they are read unconverted."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/byteorder") and archive.read(name).decode() != sys.byteorder:
                raise ValueError("its values were written by a machine of another byte order")


def mapped_tensors(path: Path) -> Any:
    """The file's content, as ``torch.load(mmap=True, weights_only=True)`` returns it for zip files.

    Only tensors in a dictionary are mapped; any other content comes without values. May raise any exception for a
    damaged or hostile file.
    """
    import torch

    with path.open("rb") as file:
        if (_unpickle(file), _unpickle(file)) != (_MAGIC, _VERSION):
            raise ValueError("no file of torch.save")
        _unpickle(file)
        storages: dict[str, _Storage] = {}
        held = _unpickle(file, storages)
        places = _places(file, _unpickle(file), storages)
    if not isinstance(held, dict):
        return held
    whole = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    return {name: _mapped(value, whole, places) for name, value in held.items()}


def _unpickle(file: BinaryIO, storages: dict[str, _Storage] | None = None) -> Any:
    """The next pickle of the file; ``storages`` collects by key the storages that it refers to."""
    import torch
    from torch._weights_only_unpickler import Unpickler

    def storage(saved: tuple[Any, ...]) -> torch.TypedStorage:
        _, kind, key, _, elements, view = saved
        if view is not None:
            raise ValueError("a storage is a part of another one")
        dtype = kind.dtype
        if key not in storages:
            storages[key] = _Storage(torch.UntypedStorage(elements * dtype.itemsize, device="meta"), dtype, elements)
        return torch.TypedStorage(wrap_storage=storages[key].empty, dtype=dtype, _internal=True)

    unpickler = Unpickler(file, encoding="utf-8")
    if storages is not None:
        unpickler.persistent_load = storage
    return unpickler.load()


def _places(file: BinaryIO, keys: list[str], storages: dict[str, _Storage]) -> dict[int, tuple[int, int]]:
    """Where each storage's bytes begin and end in the file, by the identity of its empty storage.

    Raises ValueError where the file ends too early or states another size.
    """
    places, at = {}, file.tell()
    for key in keys:
        stored = storages[key]
        file.seek(at)
        if file.read(_COUNT.size) != _COUNT.pack(stored.elements):
            raise ValueError("it ends before its values, or they are of other sizes")
        begin = at + _COUNT.size
        at = begin + stored.elements * stored.dtype.itemsize
        places[stored.empty._cdata] = (begin, at)
    if at > file.seek(0, 2):
        raise ValueError("it ends before its values do")
    return places


def _mapped(value: Any, whole: torch.UntypedStorage, places: dict[int, tuple[int, int]]) -> Any:
    """A tensor with its storage replaced by its part of the mapped file; any other value unchanged."""
    import torch

    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return value
    place = places.get(value.untyped_storage()._cdata)
    if place is None:  # it was saved without values
        return value
    begin, end = place
    return torch.empty(0, dtype=value.dtype).set_(whole[begin:end], value.storage_offset(), value.shape, value.stride())
