"""What a process on the CPU sets for itself, and that a user's settings stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from runtime.cpu_process import XLA_FLAGS, available_cpus, cpu_quota, with_defaults

# Blocks of 64 MB taken and given back: whether the system is asked for their pages each time.
CHILD = """
import ctypes, json, os, resource, torch
from runtime.cpu_process import prepare_cpu_process
prepare_cpu_process()
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


def _prepared(**variables: str) -> dict:
    unset = ("XLA_FLAGS", "NPROC", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment | variables, capture_output=True, check=True)
    return json.loads(done.stdout)


def test_defaults() -> None:
    found = _prepared()
    assert found["XLA_FLAGS"].split() == [f"--{name}={value}" for name, value in XLA_FLAGS.items()]
    assert found["threads"] == int(found["NPROC"]) == available_cpus()
    assert found["faults"] < 1000  # 4 x 64 MB are 65,536 pages


def test_a_users_settings_stand() -> None:
    own = "--xla_cpu_prefer_vector_width=128 --xla_dump_to=/nowhere"
    found = _prepared(XLA_FLAGS=own, NPROC="7", OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="100000")
    assert found["XLA_FLAGS"].startswith(own)
    assert found["XLA_FLAGS"].count("xla_cpu_prefer_vector_width") == 1
    assert (found["NPROC"], found["threads"]) == ("7", 1)
    assert found["faults"] > 10_000


def test_flags_once() -> None:
    """A second backend in one process adds nothing."""
    assert with_defaults(with_defaults("")) == with_defaults("")


@pytest.mark.parametrize(
    ("text", "cpus"), [("200000 100000\n", 2), ("150000 100000", 2), ("5000 100000", 1), ("max 100000", 2**31 - 1)]
)
def test_quota(text: str, cpus: int) -> None:
    assert cpu_quota(text) == cpus
