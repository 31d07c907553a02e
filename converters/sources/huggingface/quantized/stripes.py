"""Columns of tensors whose rows run along a weight's inputs: read as wide stripes, a few of which are kept.

A block of a weight's outputs is a few columns of such a tensor, and to read so few of every row takes as long as to
read many. So what follows is read too, and found in memory by the blocks that come next.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from converters.sources.huggingface.surplus import Held

_STRIPE_BYTES = 16 << 20
_KEPT = 6  # values, scales and zero points of the blocks of two threads


class Stripes:
    """The stripes of a source that were read last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()
        self._lock = Lock()

    def columns(self, held: Held, start: int, stop: int) -> torch.Tensor:
        """Columns [start, stop) of a tensor of two dimensions, [rows, stop - start], in the stored dtype."""
        import torch

        width = self._width(held)
        first, last = start // width, (stop - 1) // width
        pieces = []
        for number in range(first, last + 1):
            stripe, begin = self._stripe(held, number, width), number * width
            pieces.append(stripe[:, max(start - begin, 0) : stop - begin])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _stripe(self, held: Held, number: int, width: int) -> torch.Tensor:
        key = (held.name, number)
        with self._lock:
            if key not in self._kept:
                begin = number * width
                self._kept[key] = held.columns(begin, min(begin + width, held.shape[1]))
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    @staticmethod
    def _width(held: Held) -> int:
        """The columns of a stripe."""
        import torch

        rows, width = held.shape
        return max(1, min(width, _STRIPE_BYTES // (rows * getattr(torch, held.dtype).itemsize)))
