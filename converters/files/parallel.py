"""Work done in threads ahead of where its results are taken in, one after another: torch and numpy leave the lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from converters.files.allocator import keep_freed_memory

T = TypeVar("T")

WORKERS = 2
AHEAD = 8  # blocks made but not yet taken in: enough to ride out a write, few enough to stay small


def in_order(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of ``tasks`` in their order, while the next few run in WORKERS threads.

    Each task has one core: torch doesn't spread its operations over threads of its own meanwhile. A task's exception
    is raised where its result would have come.
    """
    import torch

    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    running: deque[Future[T]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for task in tasks:
                running.append(pool.submit(task))
                if len(running) > AHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
            torch.set_num_threads(threads)
