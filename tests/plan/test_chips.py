"""Every slice of the table against libtpu's own description of it, and the smallest ones compiled for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from invoke import invoke

from quantize.slices import SLICES
from runtime.plan_cli import command as plan

DESCRIBE = """
import json
from quantize.slices import SLICES
from runtime.plan.tpu_compiler import TPUCompiler
described = {}
for each in SLICES:
    devices = TPUCompiler(each).devices
    extent = [1 + max(device.coords[axis] for device in devices) for axis in range(3)]
    described[each.name] = [len(devices), extent, devices[0].device_kind]
print(json.dumps(described))
"""
needs_tpu7x = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10's libtpu doesn't know tpu7x")
KINDS = {"v4": "TPU v4", "v5p": "TPU v5", "v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


@needs_tpu7x
def test_libtpu_knows_every_slice() -> None:
    """A device for each chip, or two (tpu7x), wired up as the table has it."""
    done = subprocess.run([sys.executable, "-c", DESCRIBE], check=True, capture_output=True, text=True, timeout=300)
    described = json.loads(done.stdout)
    assert len(SLICES) == 49
    for each in SLICES:
        shape = [*each.shape, *[1] * (3 - len(each.shape))]
        assert described[each.name] == [each.devices, shape, KINDS[each.generation]], each.name


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e-1", "v6e-1"])
def test_a_slice_of_one_chip_is_compiled_for(target: str) -> None:
    wanted = ("--config", "tiny", "--int8", "--target", target, "--compile", "--json", "-")
    found = json.loads(invoke(plan, *wanted).stdout)
    held = found["per_chip"]["parameter_bytes"] + found["per_chip"]["cache_bytes"]
    assert found["chips"] == 1
    assert found["compiled"]["fits"]
    assert found["compiled"]["argument_bytes"] == pytest.approx(held, rel=0.01)
    assert found["compiled"]["collectives"] == {}


@needs_tpu7x
@pytest.mark.slow
def test_a_chip_of_two_devices_is_compiled_for() -> None:
    """A shard on each half of the chip, and their sums exchanged: two a layer, and what embedding and head need."""
    wanted = ("--config", "tiny", "--int8", "--target", "tpu7x-2", "--compile", "--json", "-")
    found = json.loads(invoke(plan, *wanted).stdout)
    held = found["per_chip"]["parameter_bytes"] + found["per_chip"]["cache_bytes"]
    assert found["chips"] == 2
    assert found["compiled"]["fits"]
    assert found["compiled"]["argument_bytes"] == pytest.approx(held, rel=0.01)
    assert found["compiled"]["all_reduce"] == 2 * 4 + 3
    assert found["compiled"]["estimated_ms"] is None  # the clock isn't published
