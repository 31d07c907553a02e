"""Stretches of a file read by their position, in any thread."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import InputError

if TYPE_CHECKING:
    import torch


class ByteReader:
    """A file open for reading. Raises OSError where it can't be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)

    def read(self, offset: int, count: int) -> torch.Tensor:
        """``count`` bytes from ``offset`` as uint8. Raises InputError where the file has become shorter."""
        import torch

        values = torch.empty(count, dtype=torch.uint8)
        view, done = memoryview(values.numpy()), 0
        while done < count:
            length = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if not length:
                raise InputError(f"{self._path} has become shorter while it was read. Fetch it again.")
            done += length
        return values
