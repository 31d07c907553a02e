"""Large tensors cut into blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_ELEMENTS = 1 << 21  # 4 MB in bfloat16: several fit in memory, and one is worth handing to a thread
CACHED_ELEMENTS = 1 << 19  # 2 MB in float32: arithmetic in steps of this size stays in the processor's cache


def row_blocks(start: int, stop: int, width: int, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of rows that cover [start, stop), of about ``elements`` each; a row has ``width`` elements."""
    step = max(1, elements // width)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
