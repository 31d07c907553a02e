"""What a process on the CPU sets for itself, and that a user's settings stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from runtime.devices.cpu.process import available_cpus, cpu_quota

# Blocks of 64 MB taken and given back: how often their pages are asked for, while weights are loaded and later.
CHILD = """
import ctypes, json, os, resource, sys, torch
from runtime.devices.cpu.process import compiler_options, keep_freed_memory, prepare_cpu_process
options = compiler_options(int(sys.argv[1]))
prepare_cpu_process()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    fill()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        fill()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def fill():
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
loading = faults()
keep_freed_memory()
found = {"loading": loading, "faults": faults(), "threads": torch.get_num_threads(), "NPROC": os.environ["NPROC"]}
print(json.dumps(found | {"options": options}))
"""


# The program of a function of 16 million numbers of each chip.
LOOP = """
import sys, torch
from runtime.devices.tracing import TracedTensor
from runtime.devices.xla import XLABackend
backend = XLABackend(int(sys.argv[1]))
x = TracedTensor((64 * backend.chips, 1 << 18), torch.float32, 0)
trace = backend._tracer.trace(lambda x, none: x.exp(), [x, []], 1)
print(backend.program(trace.graph, "loop").text)
"""


def _prepared(chips: int, **variables: str) -> dict:
    unset = ("XLA_FLAGS", "NPROC", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    command = [sys.executable, "-c", CHILD, str(chips)]
    done = subprocess.run(command, env=environment | variables, capture_output=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("spare", [1, 0])
def test_defaults(spare: int) -> None:
    """With a processor to spare, a chip's loops go by several threads."""
    cpus = available_cpus()
    found = _prepared(cpus - spare)
    passes = found["options"].pop("xla_disable_hlo_passes").split(",")
    assert passes == ["gemv-rewriter", "tree_reduction_rewriter", *([] if spare else ["cpu-parallel-task-assigner"])]
    assert found["options"] == {
        "xla_cpu_prefer_vector_width": 512,
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    } | ({} if spare else {"xla_cpu_multi_thread_eigen": False})
    assert found["threads"] == int(found["NPROC"]) == cpus
    assert found["loading"] > 10_000  # 4 x 64 MB are 65,536 pages
    assert found["faults"] < 1000


def test_a_users_settings_stand() -> None:
    own = "--xla_cpu_prefer_vector_width=128 --xla_dump_to=/nowhere"
    found = _prepared(1, XLA_FLAGS=own, NPROC="7", OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="100000")
    assert "xla_cpu_prefer_vector_width" not in found["options"]
    assert "xla_cpu_scheduler_type" in found["options"]
    assert (found["NPROC"], found["threads"]) == ("7", 1)
    assert found["faults"] > 10_000


@pytest.mark.parametrize("spare", [1, 0])
def test_loops_are_cut_for_threads_where_there_are_more_than_chips(spare: int) -> None:
    chips = available_cpus() - spare
    if not chips:
        pytest.skip("one processor has none to spare")
    environment = os.environ | {"PJRT_DEVICE": "CPU"}
    done = subprocess.run([sys.executable, "-c", LOOP, str(chips)], env=environment, capture_output=True, check=True)
    assert b"exponential" in done.stdout
    assert (b'"outer_dimension_partitions":["' in done.stdout) == bool(spare)


@pytest.mark.parametrize(
    ("text", "cpus"), [("200000 100000\n", 2), ("150000 100000", 2), ("5000 100000", 1), ("max 100000", 2**31 - 1)]
)
def test_quota(text: str, cpus: int) -> None:
    assert cpu_quota(text) == cpus
