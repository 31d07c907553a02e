"""Files of named tensors, opened without reading their values: safetensors, and torch's .bin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converters.errors import DuplicateTensor, InputError
from converters.files import CODES

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
    """A safetensors file, mapped by the library, which holds its header against its length."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 (not a mapping)
        except OSError as error:
            raise InputError(f"{path} can't be read: {error.strerror or error}.") from None
        except (SafetensorError, ValueError) as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}). Fetch or write it again.") from None
        self._check_unique()

    def names(self) -> list[str]:
        return list(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        return _DTYPE_NAMES.get(self.code(name), self.code(name))

    def code(self, name: str) -> str:
        """The format's code of the stored dtype (``BF16``)."""
        return self._slices[name].get_dtype()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._slices[name][start:stop]

    def _check_unique(self) -> None:
        """The library keeps the last of two entries of one name and says nothing."""

        def unique(pairs: list[tuple[str, Any]]) -> None:
            seen = set()
            for name, _ in pairs:
                if name in seen:
                    raise DuplicateTensor(f"{self.path} holds {name} twice in its header. Fetch or write it again.")
                seen.add(name)

        with self.path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        json.loads(header, object_pairs_hook=unique)


class PickleFile:
    """A .bin file of torch.save, mapped; only tensors and plain containers are unpickled (weights_only=True)."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except OSError as error:
            raise InputError(f"{path} can't be read: {error.strerror or error}.") from None
        except Exception as error:  # unpickling damaged or hostile bytes can raise anything
            reason = str(error).strip().split("\n")[0][:200]
            raise InputError(
                f"{path} can't be loaded safely ({reason}). Save it as safetensors, or with torch.save."
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
        return self._tensors[name][start:stop]


_DTYPE_NAMES = {code: name for name, code in CODES.items()}


def open_tensor_file(path: Path) -> TensorFile:
    """Open a file by its ending; anything but .safetensors is read as a .bin."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)
