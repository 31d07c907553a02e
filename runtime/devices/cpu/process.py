"""What a process that computes on the CPU sets for itself before XLA starts; a user's own settings stand.

- XLA's compiler uses vectors of 256 bits where the processor has 512: a loop over int8 weights runs half as fast again
  with the wider ones. On a processor without them nothing changes.
- XLA's default scheduler starts all that could run at once, so the float32 copies of many weights are alive together:
  a prompt took 6.2 GB of memory in place of 3.7, and no less time.
- The C library gives large blocks back to the system as soon as they are freed, and XLA asks for its temporaries anew
  at every execution: their page faults cost more than the arithmetic on them. It is told to keep them, in one arena,
  since only the first of its arenas can hold large blocks.
- A container may have fewer processors to itself than it sees. Threads beyond those wait for each other.
- XLA cuts every loop into a part for each of its threads, of which it has at least one for each virtual chip. Where
  there are no more processors than chips, all that brings is 16 parts of what 4 chips do at once.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

import torch

XLA_FLAGS = {
    "xla_cpu_prefer_vector_width": "512",
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
}
ONE_THREAD_FLAGS = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner", "xla_cpu_multi_thread_eigen": "false"}
_ALLOCATOR_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_LARGEST_INT = 2**31 - 1
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def prepare_cpu_process(chips: int = 1) -> None:
    """Set up this process for so many virtual chips; before torch_xla is imported or there is a second thread."""
    threads = available_cpus()
    flags = XLA_FLAGS | (ONE_THREAD_FLAGS if chips >= threads else {})
    os.environ["XLA_FLAGS"] = with_defaults(os.environ.get("XLA_FLAGS", ""), flags)
    if not any(os.environ.get(name) for name in (*_ALLOCATOR_VARIABLES, "GLIBC_TUNABLES")):
        _keep_freed_memory()
    os.environ.setdefault("NPROC", str(threads))  # what XLA's client sizes its thread pools by
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)


def with_defaults(given: str, flags: dict[str, str]) -> str:
    """What is given, with those of the flags added that it doesn't name."""
    named = {flag.lstrip("-").split("=")[0] for flag in given.split()}
    return " ".join([*given.split(), *(f"--{name}={value}" for name, value in flags.items() if name not in named)])


def available_cpus() -> int:
    """Processors that this process may use at once: by its affinity, and by its container's quota."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(present, cpu_quota(_CPU_QUOTA.read_text("ascii") if _CPU_QUOTA.exists() else "max"))


def cpu_quota(text: str) -> int:
    """Processors that a cgroup's ``cpu.max`` ("QUOTA PERIOD" in microseconds, or "max PERIOD") comes to."""
    quota, *period = text.split()
    return _LARGEST_INT if quota == "max" else max(1, math.ceil(int(quota) / int(period[0])))


def _keep_freed_memory() -> None:
    """Other C libraries than glibc are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
        mallopt(_M_ARENA_MAX, 1)
