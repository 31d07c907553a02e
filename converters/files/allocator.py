"""The C library's memory allocator, set to keep freed memory for the next allocation."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEEP_BYTES = 256 << 20
_LARGEST_KEPT = 32 << 20  # the largest value that glibc takes


def keep_freed_memory() -> None:
    """Have glibc reuse freed blocks of a few megabytes instead of returning them to the system.

    By default it returns such blocks at once, and the page faults of getting them again cost more than the arithmetic
    on them. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
