"""Work done ahead in threads, with results taken in order: torch and numpy release Python's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from converters.files.allocator import keep_freed_memory

T = TypeVar("T")

WORKERS = 2
AHEAD = 8  # results made but not yet taken: enough to bridge a write, few enough to stay small


_threads: list[int] = []  # of torch, where ``in_order`` was called


@contextmanager
def every_core() -> Iterator[None]:
    """Let torch's operations use as many threads as it has otherwise, also between the tasks of ``in_order``."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(_threads[0] if _threads else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of ``tasks`` in order, while the next few tasks run in WORKERS threads.

    Each task has one core: meanwhile torch runs its operations in a single thread. A task's exception is raised in
    place of its result.
    """
    import torch

    keep_freed_memory()
    threads = torch.get_num_threads()
    _threads.append(threads)
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
            _threads.pop()
            torch.set_num_threads(threads)
