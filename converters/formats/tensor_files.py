"""Files of named tensors, opened without reading their values: safetensors, and torch's .bin and .pth."""

from __future__ import annotations

import json
import warnings
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converters.console.errors import DuplicateTensor, InputError
from converters.files.mapped import file_offset, mappings
from converters.files.streams import StreamReader
from converters.files.text_path import text_path
from converters.formats.legacy_pickle import check_byte_order, is_zip, mapped_tensors
from converters.formats.safetensors import DTYPE_NAMES

if TYPE_CHECKING:
    import torch


class TensorFile(Protocol):
    """Named tensors of one file; ``rows`` reads a few of them."""

    path: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """torch's name of the stored dtype (``bfloat16``)."""
        ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along the first axis, on the host."""
        ...


class SafetensorsFile:
    """A safetensors file. The library holds its header against its length; values are read, not mapped.

    So what is resident is what was asked for, however large the file.
    """

    def __init__(self, path: Path) -> None:
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
        """The format's code of the stored dtype (``BF16``)."""
        return self._entries[name]["dtype"]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        shape = (stop - start, *self.shape(name)[1:])
        dtype = getattr(torch, self.dtype(name))
        row_bytes = prod(shape[1:]) * dtype.itemsize
        begin = self._begin + self._entries[name]["data_offsets"][0] + start * row_bytes
        return self._stream.values(begin, dtype, shape)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A JSON object whose names are unique; the library keeps the last of two and says nothing."""
        entries: dict[str, Any] = {}
        for name, value in pairs:
            if name in entries:
                raise DuplicateTensor(f"{self.path} holds {name} twice in its header. Fetch or write it again.")
            entries[name] = value
        return entries


class PickleFile:
    """A .bin or .pth of torch.save, of any age; only tensors and plain containers are unpickled (weights_only=True).

    The file is mapped to be unpickled; values are read from where they lie in it, so that little becomes resident.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            with text_path(path) as readable, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle protocols; what can't be read raises
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
                f"{path} can't be loaded safely ({reason}). If it came whole, it holds more than tensors: save these "
                "alone, as safetensors."
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
        mapped = self._tensors[name].detach()[start:stop]
        offset = file_offset(self._mappings, mapped.data_ptr(), mapped.nbytes)
        if offset is None or not mapped.is_contiguous():
            return mapped.clone()
        return self._file.values(offset, mapped.dtype, mapped.shape)


def open_tensor_file(path: Path) -> TensorFile:
    """Open a file by its ending; anything but .safetensors is read as a .bin."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)
