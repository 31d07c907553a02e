"""PJRT_DEVICE names a device that isn't there: one line, and no waiting for one that will not come."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from invoke import invoke, invoke_error
from models import write_hf

from quantize.cli import command as quantize
from runtime.cli import command as run
from runtime.devices import xla

ARGUMENTS = ["--prompt-ids", "1,5", "--max-new-tokens", "2", "--max-seq-len", "16", "--buckets", "8"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("device")
    invoke(quantize, write_hf(root / "hf"), "--int8", "--out", root / "shards")
    return root / "shards"


@pytest.mark.parametrize("kind", ["CUDA", "nonsense"])
def test_a_device_that_xla_does_not_have(kind: str, shards: Path) -> None:
    code = "from runtime.cli import main; main()"
    line = [sys.executable, "-c", code, "--shards", str(shards), *ARGUMENTS]
    done = subprocess.run(line, env=os.environ | {"PJRT_DEVICE": kind}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"Error: XLA can't use PJRT_DEVICE={kind} (")
    assert "set it to CPU" in done.stderr


@pytest.mark.parametrize("kind", ["TPU", "tpu"])
def test_a_tpu_that_is_not_there(kind: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libtpu, where it is installed, would wait for it."""
    monkeypatch.setattr(xla.glob, "glob", lambda pattern: [])
    monkeypatch.setenv("PJRT_DEVICE", kind)
    line = invoke_error(run, "--shards", shards, *ARGUMENTS)
    assert "PJRT_DEVICE is TPU and this machine has none" in line


@pytest.mark.parametrize(
    ("given", "device_files", "chosen"),
    [(None, [], "CPU"), ("", [], "CPU"), (" cpu ", [], "CPU"), (None, ["/dev/accel0"], "TPU"), ("CUDA", [], "CUDA")],
)
def test_the_device_chosen(
    given: str | None, device_files: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xla.glob, "glob", lambda pattern: device_files if "accel" in pattern else [])
    monkeypatch.setenv("PJRT_DEVICE", given or "")
    if given is None:
        monkeypatch.delenv("PJRT_DEVICE")
    assert xla.choose_device() == chosen
