"""The program that measures a chip's memory: what torch_xla traces of it and what the TPU's compiler makes of that."""

from __future__ import annotations

import re

import pytest
import torch
import virtual_chips

from quantize.slices import find_slice
from runtime.devices import xla
from runtime.devices.tracing import TracedTensor, Tracer
from runtime.plan.tpu_compiler import CompiledProgram, TPUCompiler

TARGETS = ["v4-8", "v5p-8", "v5e-4", "v6e-1"]
READS, BUFFER = 16, 2 * 11520**2


@pytest.fixture(scope="module")
def programs() -> dict[str, tuple[str, CompiledProgram]]:
    """By slice, the probe as it is traced and as it is compiled."""
    found = {}
    for name in TARGETS:
        target = find_slice(name)
        values, rows = (
            TracedTensor((target.devices, length, xla.PROBE_SIZE), torch.bfloat16, 0)
            for length in (xla.PROBE_SIZE, xla.PROBE_ROWS)
        )
        graph = Tracer().trace(xla.read_repeatedly, [values, [rows]], 1).graph
        found[name] = virtual_chips.stablehlo_text(graph), TPUCompiler(target).compile(graph)
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_the_traced_graph_multiplies(target: str, programs: dict[str, tuple[str, CompiledProgram]]) -> None:
    """Every product takes in the buffer itself; what goes in beside it, and comes out, is a few rows."""
    traced, _ = programs[target]
    chips = find_slice(target).devices
    [header] = re.findall(r"@main\(.*?\) -> .*", traced)
    assert f"tensor<{chips}x11520x11520xbf16>" in header.split("->")[0]
    assert f"tensor<{chips}x8x11520xbf16>" in header.split("->")[1]
    assert traced.count("stablehlo.dot") == READS


@pytest.mark.parametrize("target", TARGETS)
def test_the_compiled_program_reads_and_writes_little(
    target: str, programs: dict[str, tuple[str, CompiledProgram]]
) -> None:
    """Less memory than before it by far, at most 256 MiB; nothing is copied, and no chip waits for another."""
    _, program = programs[target]
    assert BUFFER <= 256 << 20
    assert program.argument_bytes + program.output_bytes + program.temp_bytes < BUFFER * (1 + 1 / 256)
    entry = program.text[program.text.index("\nENTRY ") :]
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
    torch.manual_seed(1)
    values = torch.linalg.qr(torch.randn(2, 24, 24, dtype=torch.float64)).Q
    rows = torch.randn(2, xla.PROBE_ROWS, 24, dtype=torch.float64)
    [found] = xla.read_repeatedly(values, [rows])
    assert torch.allclose(found, rows @ torch.linalg.matrix_power(values.mT, READS))


def test_the_measurement_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On virtual chips, which stand in for those that would be measured so."""
    monkeypatch.setattr(xla, "PROBE_SIZE", 64)
    virtual_chips.start()
    backend = xla.XLABackend(2)
    backend.tiled = False  # as of chips whose memory is measured by the program
    assert backend.read_bandwidth() > 0
