"""PJRT_DEVICE names a device that isn't there: one line, and no waiting for one that will not come."""

from __future__ import annotations

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
KINDS = ["CUDA", "nonsense"]
# llama-run asked for one kind of device after the other: the exit statuses.
ASK = """
import os, sys
from runtime.cli import main
kinds, sys.argv[1:] = sys.argv[1:3], sys.argv[3:]
for os.environ["PJRT_DEVICE"] in kinds:
    try:
        main()
    except SystemExit as end:
        print(end.code)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("device")
    invoke(quantize, write_hf(root / "hf"), "--int8", "--out", root / "shards")
    return root / "shards"


def test_devices_that_xla_does_not_have(shards: Path) -> None:
    """One after the other, in a process that has started nothing yet."""
    line = [sys.executable, "-c", ASK, *KINDS, "--shards", str(shards), *ARGUMENTS]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n2\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    for kind, line in zip(KINDS, lines, strict=True):
        assert line.startswith(f"Error: XLA can't use PJRT_DEVICE={kind} (")
        assert "set it to CPU" in line


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
