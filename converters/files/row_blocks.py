"""Large tensors in blocks of rows: small enough that several fit in memory, large enough to be worth a thread."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_ELEMENTS = 1 << 21  # 4 MB in bfloat16: few enough to hold several, enough to be worth handing to a thread
CACHED_ELEMENTS = 1 << 19  # as float32, 2 MB: arithmetic in steps of this size stays in the cache


def row_blocks(start: int, stop: int, width: int, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Consecutive ranges that cover rows [start, stop) of ``width`` elements, each of about ``elements``."""
    step = max(1, elements // width)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
