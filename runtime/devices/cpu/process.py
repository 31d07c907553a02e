"""What a process that computes on the CPU sets before XLA starts, and XLA's options. A user's own take precedence.

- By default XLA's compiler uses vectors of 256 bits even where the processor has 512: a loop over int8 weights runs
  half as fast again with the wider ones. On a processor without them nothing changes.
- XLA's default scheduler converts many weights at once, although each is used once: 90 MB of copies for one weight of
  7B's feed-forward layer, where the one that saves memory needs 7 MB, which stay in the cache.
- One of XLA's passes (gemv-rewriter) turns a matrix times a vector into a product of two matrices, for which the whole
  weight is converted in memory first: five times slower.
- XLA hands sums to a library, which reads only what has been decoded in memory before; products of bfloat16 need that
  library. Sums that it isn't given are split for precision, which also writes all terms to memory
  (tree_reduction_rewriter). XLA's own loops over a sum decode in registers.
- The C library returns large blocks to the system as soon as they are freed, and XLA allocates its temporaries again at
  every execution: the page faults cost more than the arithmetic. So the library is told to keep freed blocks, in one
  arena, since only its first arena can hold large blocks.
- A container may be allowed fewer processors than it sees. Threads beyond that number wait for each other.
- XLA splits every loop into one part per thread, and it has at least one thread per virtual chip. With no more
  processors than chips this gains nothing: what 4 chips do at once becomes 16 parts.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import Any

import torch

from runtime.devices.pjrt import environment, versions

_DISABLED_PASSES = "xla_disable_hlo_passes"
_SLOW_PASSES = "gemv-rewriter,tree_reduction_rewriter"
_OPTIONS = {"xla_cpu_prefer_vector_width": 512, _DISABLED_PASSES: _SLOW_PASSES}
_LIBRARY = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
_SCHEDULER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_OLD_SCHEDULER = {"xla_cpu_enable_concurrency_optimized_scheduler": False}  # of jaxlib 0.6, which Python 3.10 gets
_ONE_THREAD_OPTIONS = {
    _DISABLED_PASSES: f"{_SLOW_PASSES},cpu-parallel-task-assigner",
    "xla_cpu_multi_thread_eigen": False,
}
_ALLOCATOR_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # of glibc's malloc.h
_LARGE = 1 << 20  # bytes of a block that gets pages of its own while weights are loaded
_LARGEST_INT = 2**31 - 1
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def prepare_cpu_process() -> None:
    """Set up this process. Call it before starting XLA or a thread, and ``keep_freed_memory`` before computing."""
    threads = available_cpus()
    _set_allocator({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: _LARGE})
    os.environ.setdefault("NPROC", str(threads))  # the size of XLA's thread pools
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)


def compiler_options(chips: int) -> dict[str, Any]:
    """XLA's settings for programs on ``chips`` virtual chips, but for those that the user names in XLA_FLAGS."""
    by_version = _OLD_SCHEDULER if versions()["jaxlib"].startswith("0.6.") else _SCHEDULER | _LIBRARY
    options = _OPTIONS | by_version | (_ONE_THREAD_OPTIONS if chips >= available_cpus() else {})
    named = {flag.lstrip("-").split("=")[0] for flag in environment().get("XLA_FLAGS", [])}
    return {name: value for name, value in options.items() if name not in named}


def available_cpus() -> int:
    """Processors that this process may use at once, by its affinity and its container's quota."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(present, cpu_quota(_CPU_QUOTA.read_text("ascii") if _CPU_QUOTA.exists() else "max"))


def cpu_quota(text: str) -> int:
    """Processors that a cgroup's ``cpu.max`` ("QUOTA PERIOD" in microseconds, or "max PERIOD") amounts to."""
    quota, *period = text.split()
    return _LARGEST_INT if quota == "max" else max(1, math.ceil(int(quota) / int(period[0])))


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory. Call it when the weights are loaded: what is read of them would be kept as well,
    and glibc before 2.38 doesn't use an aligned block again for another of its size (0.6 GB for weights of 3.8 GB).
    """
    _set_allocator({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _LARGEST_INT})


def return_freed_memory() -> None:
    """Give what is free to the system now, although freed memory is kept: what the compiler needed, XLA doesn't."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set_allocator(settings: dict[int, int]) -> None:
    """glibc's settings, unless the user has chosen some; other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(os.environ.get(name) for name in (*_ALLOCATOR_VARIABLES, "GLIBC_TUNABLES")):
        for setting, value in settings.items():
            mallopt(setting, value)
