"""The program that measures a chip's memory: what torch_xla traces of it and what the TPU's compiler makes of that."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

# Traces the probe and compiles it for the slices that the arguments name; their programs as JSON.
COMPILE = """
import json, sys
from dataclasses import asdict
import torch
from jax._src.lib import xla_client
from quantize.slices import find_slice
from runtime.plan.tpu_compiler import TPUCompiler
from runtime.devices.xla import PROBE_SIZE, Tracer, read_repeatedly
found = {}
for name in sys.argv[2:]:
    target = find_slice(name)
    tracer = Tracer(target.devices)
    values = tracer.zeros((target.devices, PROBE_SIZE, PROBE_SIZE), torch.bfloat16, 0)
    graph = tracer.trace(read_repeatedly, (values, []), 1)
    traced = xla_client.XlaComputation(graph.hlo).as_hlo_text()
    found[name] = {"traced": traced} | asdict(TPUCompiler(target).compile(graph))
open(sys.argv[1], "w").write(json.dumps(found))
"""
TARGETS = ["v4-8", "v5p-8", "v5e-4", "v6e-1"]
READS, BUFFER = 16, 2 * 11520**2


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("probe") / "programs.json"
    subprocess.run([sys.executable, "-c", COMPILE, path, *TARGETS], check=True, timeout=300)
    return json.loads(path.read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_the_traced_graph_multiplies(target: str, programs: dict[str, dict]) -> None:
    """Every product takes in the buffer itself, and what comes out is a few rows."""
    traced = programs[target]["traced"]
    chips = re.search(r"entry_computation_layout=\{\(bf16\[(\d+),11520,11520\]", traced)[1]
    assert f"->(bf16[{chips},8,11520]" in traced
    assert traced.count(" dot(") == READS


@pytest.mark.parametrize("target", TARGETS)
def test_the_compiled_program_reads_and_writes_little(target: str, programs: dict[str, dict]) -> None:
    """Less memory than before it by far, at most 256 MiB; nothing is copied, and no chip waits for another."""
    program = programs[target]
    assert program["argument_bytes"] == BUFFER <= 256 << 20
    assert program["output_bytes"] + program["temp_bytes"] < BUFFER / 256
    entry = program["text"][program["text"].index("\nENTRY ") :]
    [buffer] = re.findall(r"%(\S+) = bf16\[1,11520,11520\]\S* parameter\(0\)", entry)
    made = [line for line in entry.splitlines() if re.match(r"\s+(ROOT )?%\S+ = ", line) and " parameter(" not in line]
    readers = [line for line in made if re.search(rf"%{re.escape(buffer)}[,)]", line)]
    assert len(readers) == READS
    assert not [line for line in made if re.search(r" = \(?\w+\[[^=]*11520,11520", line.split(" fusion(")[0])]
    assert not re.search(r" (all-reduce|all-gather|all-to-all|collective-permute)", entry)


def test_it_is_larger_than_what_a_chip_keeps_near() -> None:
    """128 MiB: CMEM of v4, VMEM of v5e and v6e (cloud.google.com/tpu/docs; jax-ml, "How to Scale Your Model")."""
    assert BUFFER > 1.5 * (128 << 20)


def test_it_computes_powers_of_a_matrix() -> None:
    """In float64, on matrices that are small and turn: so that no product can be left out."""
    from runtime.devices.xla import read_repeatedly

    torch.manual_seed(1)
    values = torch.linalg.qr(torch.randn(2, 24, 24, dtype=torch.float64)).Q
    expected = values[:, :8] @ torch.linalg.matrix_power(values.mT, READS)
    assert torch.allclose(read_repeatedly(values, []), expected)


MEASURE = """
from runtime.devices import xla
xla.PROBE_SIZE = 64
backend = xla.XLABackend(2)
backend.platform = "tpu/xla"  # whose memory is measured by the program
print(backend.read_bandwidth())
"""


def test_the_measurement_runs() -> None:
    """On virtual chips, which stand in for those that would be measured so."""
    done = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True, timeout=300)
    assert float(done.stdout) > 0
