"""Files that promise far more than they hold: refused soon, and without taking the memory or the disk promised."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from invoke import invoke, refuse
from models import SMALL, edit_json, write_hf

from converters.cli import command as convert
from converters.model.config import ModelConfig
from converters.model.families.hf_config import to_hf
from quantize.cli import command as quantize

SECONDS = 10
GIGANTIC = {"hidden_size": 1 << 24, "intermediate_size": 1 << 24, "num_hidden_layers": 1024, "vocab_size": 1 << 24}
# Runs a command given as MODULE ARGUMENTS and tells the most memory, in kB, that it took.
MEASURE = """
import resource, sys
from importlib import import_module
from converters.console.command import run
try:
    run(import_module(sys.argv[1]).command, sys.argv[2:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_bytes(module: str, *arguments: object, status: int) -> int:
    """The most memory that a command takes, in a process of its own."""
    words = [sys.executable, "-c", MEASURE, module, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return int(done.stdout.split()[-1]) * 1024


@pytest.fixture(scope="module")
def usual_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What converting a small model takes: nearly all of it the libraries."""
    root = tmp_path_factory.mktemp("usual")
    return peak_bytes("converters.cli", "--source", write_hf(root / "hf"), "--out", root / "out", status=0)


def test_gigantic_config_beside_a_small_file(tmp_path: Path, usual_bytes: int) -> None:
    write_hf(tmp_path / "hf", **GIGANTIC, head_dim=128)
    for form in ("safetensors", "bin"):
        begin = time.perf_counter()
        refuse(tmp_path, convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", says=["lacks the tensor"])
        assert time.perf_counter() - begin < SECONDS
        arguments = ("--source", tmp_path / "hf", "--out", tmp_path / "out")
        assert peak_bytes("converters.cli", *arguments, status=2) < usual_bytes + (100 << 20)
        if form == "safetensors":
            torch.save({"model.norm.weight": torch.ones(16)}, tmp_path / "hf" / "pytorch_model.bin")
            (tmp_path / "hf" / "model.safetensors").unlink()


def test_gigantic_random_model(tmp_path: Path, usual_bytes: int) -> None:
    """Its seed is small and may be kept; shards of it don't fit, which is said before anything is made."""
    (tmp_path / "big.json").write_text(json.dumps(to_hf(SMALL) | GIGANTIC | {"head_dim": 128}))
    begin = time.perf_counter()
    assert "Kept the seed" in invoke(convert, "--config", tmp_path / "big.json", "--out", tmp_path / "seed").stdout
    refuse(tmp_path, quantize, tmp_path / "seed", "--int8", "--out", tmp_path / "out", says=["are free there"])
    arguments = ("--config", tmp_path / "big.json", "--out", tmp_path / "files", "--storage", "files")
    refuse(tmp_path, convert, *arguments, says=["are free there"])
    assert time.perf_counter() - begin < 3 * SECONDS
    assert peak_bytes("quantize.cli", tmp_path / "seed", "--int8", status=2) < usual_bytes + (200 << 20)


def test_small_file_that_repeats_one_value(tmp_path: Path, usual_bytes: int) -> None:
    """torch.save keeps an expanded tensor as one value with strides of zero: a terabyte in a file of some kilobytes."""
    config = replace(SMALL, vocab_size=1 << 24, hidden_size=1 << 14)
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(to_hf(config)))
    torch.save(expanded(config), tmp_path / "hf" / "pytorch_model.bin")
    refuse(tmp_path, convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", says=["are free there"])
    arguments = ("--source", tmp_path / "hf", "--out", tmp_path / "out")
    assert peak_bytes("converters.cli", *arguments, status=2) < usual_bytes + (100 << 20)


def expanded(config: ModelConfig) -> dict[str, torch.Tensor]:
    from converters.model.parameters import parameters

    one = torch.ones(1, dtype=torch.bfloat16)
    return {parameter.name: one.expand(parameter.shape) for parameter in parameters(config)}


def test_manifest_of_very_many_chips_and_layers(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "out")
    edit_json(tmp_path / "out" / "shards.json", lambda content: content.update(chips=4096))
    edit_json(tmp_path / "out" / "config.json", lambda content: content.update(num_hidden_layers=4096))
    begin = time.perf_counter()
    refuse(tmp_path, quantize, "--verify", "--out", tmp_path / "out", says=["lists other tensors"])
    assert time.perf_counter() - begin < SECONDS


def test_as_many_chips_as_can_be_asked_for(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    begin = time.perf_counter()
    invoke(quantize, tmp_path / "hf", "--int8", "--chips", 4096, "--out", tmp_path / "out", "--dry-run")
    arguments = ("--int8", "--chips", 4096, "--only-chip", 4095, "--only-chip", 0, "--out", tmp_path / "out")
    invoke(quantize, tmp_path / "hf", *arguments)
    assert time.perf_counter() - begin < SECONDS
