"""What a process on the CPU sets for itself, and that a user's settings stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.devices.cpu.process import ONE_THREAD_FLAGS, XLA_FLAGS, available_cpus, cpu_quota, with_defaults

# Blocks of 64 MB taken and given back: whether the system is asked for their pages each time.
CHILD = """
import ctypes, json, os, resource, sys, torch
from runtime.devices.cpu.process import prepare_cpu_process
prepare_cpu_process(int(sys.argv[1]))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def fill():
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    fill()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keys = ("XLA_FLAGS", "NPROC")
print(json.dumps({"faults": faults, "threads": torch.get_num_threads()} | {key: os.environ[key] for key in keys}))
"""


# A sum over 16 million numbers, of each chip.
SUM = """
import sys, torch
from runtime.devices.xla import XLABackend
backend = XLABackend(int(sys.argv[1]))
x = backend.zeros((64 * backend.chips, 1 << 18), torch.float32, 0)
backend.compile(lambda x, none: x.exp().sum(), donates=1)(x, [])
backend.wait()
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
    expected = XLA_FLAGS if spare else XLA_FLAGS | ONE_THREAD_FLAGS
    assert found["XLA_FLAGS"].split() == [f"--{name}={value}" for name, value in expected.items()]
    assert found["threads"] == int(found["NPROC"]) == cpus
    assert found["faults"] < 1000  # 4 x 64 MB are 65,536 pages


def test_a_users_settings_stand() -> None:
    own = "--xla_cpu_prefer_vector_width=128 --xla_dump_to=/nowhere"
    found = _prepared(1, XLA_FLAGS=own, NPROC="7", OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="100000")
    assert found["XLA_FLAGS"].startswith(own)
    assert found["XLA_FLAGS"].count("xla_cpu_prefer_vector_width") == 1
    assert (found["NPROC"], found["threads"]) == ("7", 1)
    assert found["faults"] > 10_000


@pytest.mark.parametrize("spare", [1, 0])
def test_loops_are_cut_for_threads_where_there_are_more_than_chips(spare: int, tmp_path: Path) -> None:
    chips = available_cpus() - spare
    if not chips:
        pytest.skip("one processor has none to spare")
    environment = os.environ | {"PJRT_DEVICE": "CPU", "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"}
    subprocess.run([sys.executable, "-c", SUM, str(chips)], env=environment, capture_output=True, check=True)
    texts = [path.read_text() for path in tmp_path.glob("*SyncTensorsGraph*after_optimizations.txt")]
    assert any("exponential" in text for text in texts)
    assert any("outer_dimension_partitions" in text for text in texts) == bool(spare)


def test_flags_once() -> None:
    """A second backend in one process adds nothing."""
    once = with_defaults("", XLA_FLAGS)
    assert with_defaults(once, XLA_FLAGS) == once


@pytest.mark.parametrize(
    ("text", "cpus"), [("200000 100000\n", 2), ("150000 100000", 2), ("5000 100000", 1), ("max 100000", 2**31 - 1)]
)
def test_quota(text: str, cpus: int) -> None:
    assert cpu_quota(text) == cpus
