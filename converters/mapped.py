"""Pages of mapped files given back after use, so that reading a file of any size keeps little of it resident."""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache

_MADV_DONTNEED = 4  # of Linux; Python's mmap has it for its own mappings only


def release(address: int, nbytes: int) -> None:
    """Drop the pages under ``nbytes`` from ``address`` of a read-only file mapping; a later access reads them again."""
    madvise = _madvise()
    if madvise is not None:
        start = address - address % mmap.PAGESIZE
        madvise(start, nbytes + address - start, _MADV_DONTNEED)


@lru_cache(maxsize=1)
def _madvise() -> ctypes._CFuncPtr | None:
    """The C library's madvise; None on systems without it, where pages stay until the kernel wants them."""
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
