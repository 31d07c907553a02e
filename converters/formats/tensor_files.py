"""Files of named tensors, opened without reading their values: safetensors, and torch's .bin and .pth."""

from __future__ import annotations

import json
import warnings
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converters.console.errors import DuplicateTensor, InputError
from converters.files.memory_maps import file_offset, mappings
from converters.files.streams import StreamReader
from converters.files.text_path import text_path
from converters.formats.legacy_pickle import check_byte_order, is_zip, mapped_tensors
from converters.formats.safetensors import DTYPE_NAMES

if TYPE_CHECKING:
    import torch


class TensorFile(Protocol):
    """The named tensors of one file, whose values are read only by ``rows``."""

    path: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """torch's name for the stored dtype (``bfloat16``)."""
        ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along the first axis, [stop - start, ...] on the host, in the stored dtype.

        A single number has one row.
        """
        ...

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns [start, stop) of a tensor of two dimensions, [rows, stop - start], in the stored dtype."""
        ...


class SafetensorsFile:
    """A safetensors file. The library checks its header against its length; values are read, not mapped.

    So only what was asked for is resident, however large the file is.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError for a file that can't be read, is damaged, or names a tensor twice."""
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="numpy"):  # checks lengths, offsets and overlaps
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length), object_pairs_hook=self._unique)
            self._stream = StreamReader(path)
        except OSError as error:
            raise InputError(f"{path} can't be read: {error.strerror or error}.") from None
        except (SafetensorError, ValueError) as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}). Fetch or write it again.") from None
        self._begin = 8 + length
        self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        return DTYPE_NAMES.get(self.code(name), self.code(name))

    def code(self, name: str) -> str:
        """The format's code for the stored dtype (``BF16``)."""
        return self._entries[name]["dtype"]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        shape = (stop - start, *self.shape(name)[1:])
        dtype = getattr(torch, self.dtype(name))
        row_bytes = prod(shape[1:]) * dtype.itemsize
        begin = self._begin + self._entries[name]["data_offsets"][0] + start * row_bytes
        return self._stream.values(begin, dtype, shape)

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        rows, width = self.shape(name)
        dtype = getattr(torch, self.dtype(name))
        begin = self._begin + self._entries[name]["data_offsets"][0]
        shape = (rows, width * dtype.itemsize)
        return self._stream.columns(begin, shape, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A JSON object with unique names: the library would silently keep the last of two."""
        entries: dict[str, Any] = {}
        for name, value in pairs:
            if name in entries:
                raise DuplicateTensor(f"{self.path} holds {name} twice in its header. Fetch or write it again.")
            entries[name] = value
        return entries


class PickleFile:
    """A .bin or .pth of torch.save, old or new; only tensors and plain containers are unpickled (weights_only=True).

    The file is mapped to be unpickled, but values are read from it by position, so that little becomes resident.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError for a file that can't be loaded safely, or holds something else than plain tensors."""
        import torch

        self.path = path
        try:
            with text_path(path) as readable, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols; unreadable files raise anyway
                if is_zip(path):
                    check_byte_order(path)
                    tensors = torch.load(readable, map_location="cpu", mmap=True, weights_only=True)
                else:
                    tensors = mapped_tensors(readable)
            self._file, self._mappings = StreamReader(path), mappings(path)
        except OSError as error:
            raise InputError(f"{path} can't be read: {error.strerror or error}.") from None
        except Exception as error:  # unpickling damaged or hostile bytes can raise anything
            reason = str(error).strip().split("\n")[0][:200]
            raise InputError(
                f"{path} can't be loaded safely ({reason}). If it is complete, it holds more than tensors: save only "
                "those, as safetensors."
            ) from None
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
        ):
            raise InputError(f"{path} does not hold a dictionary of tensors; it is no checkpoint file.")
        for name, tensor in tensors.items():
            if tensor.layout is not torch.strided or tensor.device.type != "cpu":
                raise InputError(f"{path}: the tensor {name} is sparse or holds no values. Save it as a plain tensor.")
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name].detach()
        mapped = tensor[start:stop] if tensor.dim() else tensor.view(1)
        offset = file_offset(self._mappings, mapped.data_ptr(), mapped.nbytes)
        if offset is None or not mapped.is_contiguous():
            return mapped.clone()
        return self._file.values(offset, mapped.dtype, mapped.shape)

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        mapped = self._tensors[name].detach()
        offset = file_offset(self._mappings, mapped.data_ptr(), mapped.nbytes)
        if offset is None or not mapped.is_contiguous():
            return mapped[:, start:stop].clone()
        (rows, width), size = mapped.shape, mapped.itemsize
        return self._file.columns(offset, (rows, width * size), start * size, stop * size).view(mapped.dtype)


def open_tensor_file(path: Path) -> TensorFile:
    """Open a file by its suffix; anything but .safetensors is read as torch's. Raises InputError."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)
