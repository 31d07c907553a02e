"""What every source of weights offers: tensors by Hugging Face name, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from converters.config import ModelConfig

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 21  # 4 MB in bfloat16: few enough to hold several, enough to be worth handing to a thread
CACHED_ELEMENTS = 1 << 19  # as float32, 2 MB: arithmetic in steps of this size stays in the cache


class TensorSource(Protocol):
    """A model's weights in Hugging Face names, shapes and RoPE row order, whatever they are stored as.

    Opening a source checks its names and shapes against the parameter table; values are read by ``rows`` alone.
    """

    config: ModelConfig  # ``config.dtype`` is the dtype in which ``rows`` gives the weights

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor along its first axis, on the host. Raises InputError for unreadable data."""
        ...

    def fingerprint(self) -> str:
        """A hex digest that changes when the source's configuration or files do."""
        ...

    def files(self) -> list[Path]:
        """The files that values are read from; none for values that are made."""
        ...

    def companions(self) -> dict[str, bytes]:
        """The files that go with the weights (tokenizer, generation settings): file name -> content."""
        ...


def row_blocks(start: int, stop: int, width: int, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Consecutive ranges that cover rows [start, stop) of ``width`` elements, each of about ``elements``."""
    step = max(1, elements // width)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
