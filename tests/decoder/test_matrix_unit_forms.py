"""Weights in the forms for chips with a matrix unit (TPUs), run on virtual chips: logits against eager torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import virtual_chips
from invoke import invoke, refuse
from models import make_model
from parity import relative

from quantize.cli import command as quantize
from quantize.shards.reading import Shards
from runtime.cli import command as run
from runtime.devices import xla
from runtime.devices.backend import Backend
from runtime.devices.host import HostBackend
from runtime.model.kv_cache import FunctionalKVCache
from runtime.run.generate import Generator
from runtime.run.load import load_decoder, make_cache
from runtime.run.session import open_session

# Three chips divide neither the heads nor the groups of the feed-forward layer's inputs.
SIZES = {"heads": 5, "kv_heads": 5, "hidden": 160, "head_dim": 32, "ffn": 224, "vocab": 517}
FORMATS = {
    "int8": (),
    "int8 in groups": ("--group-size", 32),
    "int4": (),
    "int4 with zero points": ("--zero-points",),
    "int4 per channel": ("--group-size", "channel"),
    "int4 per channel with zero points": ("--group-size", "channel", "--zero-points"),
    "fp8": (),
    "fp8 in groups": ("--group-size", 32),
}
PROMPT = [[3, 5, 7, 9, 11, 200, 300, 44, 23]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    make_model(root / "hf", **SIZES)
    return root / "hf"


def shard(checkpoint: Path, out: Path, name: str, chips: int) -> Path:
    invoke(quantize, checkpoint, f"--{name.split()[0]}", *FORMATS[name], "--chips", chips, "--out", out)
    return out


def matrix_units(chips: int, int8_activations: bool = False) -> xla.XLABackend:
    """Virtual chips that take weights as TPUs do."""
    backend = xla.XLABackend(chips, int8_activations=int8_activations)
    backend.tiled, backend.cache_type, backend.fuse_bytes = False, FunctionalKVCache, xla.TPU_FUSE_BYTES
    backend.form = xla._chip_form(xla.TPU_LEAST_ROWS, chips, int8_activations)
    return backend


def logits(shards: Shards, backend: Backend, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Logits after the prompt, and the bytes of parameters that each chip holds."""
    with torch.no_grad(), virtual_chips.quickly_compiled():
        decoder, nbytes = load_decoder(shards, shards.config, dtype, backend, lambda *done: None)
        cache = make_cache(shards.config, backend, 1, 32, dtype)
        return Generator(shards.config, decoder, cache, backend, [8]).logits(PROMPT).float(), nbytes


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chips", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)])
def test_logits_are_those_of_eager_torch(checkpoint: Path, tmp_path: Path, name: str, chips: int) -> None:
    virtual_chips.start()
    shards = Shards(shard(checkpoint, tmp_path / "out", name, chips))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        expected, _ = logits(shards, HostBackend("eager"), dtype)
        found, nbytes = logits(shards, matrix_units(chips), dtype)
        assert relative(found, expected) < bound
        # Norms are held in float32, and so are the scales of groups; 4-bit values take half a byte.
        assert nbytes < 1.1 * shards.manifest.files[0].nbytes


@pytest.mark.parametrize("name", ["int8", "int4 per channel"])
def test_activations_in_int8(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """On one chip, what eager torch computes; on three, each chip's part of a row is rounded by itself."""
    virtual_chips.start()
    one, three = (Shards(shard(checkpoint, tmp_path / str(chips), name, chips)) for chips in (1, 3))
    plain, _ = logits(one, HostBackend("eager"), torch.float32)
    rounded, _ = logits(one, HostBackend("eager", int8_activations=True), torch.float32)
    assert 1e-3 < relative(rounded, plain) < 0.1
    found, _ = logits(one, matrix_units(1, int8_activations=True), torch.float32)
    assert relative(found, rounded) < 1e-4
    found, _ = logits(three, matrix_units(3, int8_activations=True), torch.float32)
    assert 1e-3 < relative(found, plain) < 0.1
    options = {"dtype": torch.float32, "activations": "int8", "max_seq_len": 32, "buckets": [8]}
    with virtual_chips.quickly_compiled(), open_session(three.directory, **options) as session:
        assert relative(session.logits(PROMPT), found) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4 per channel"])
def test_activations_in_int8_under_inductor(checkpoint: Path, tmp_path: Path, name: str) -> None:
    one = Shards(shard(checkpoint, tmp_path / "out", name, 1))
    expected, _ = logits(one, HostBackend("eager", int8_activations=True), torch.float32)
    options = {"dtype": torch.float32, "activations": "int8", "max_seq_len": 32, "buckets": [8]}
    with open_session(one.directory, backend="inductor", **options) as session:
        assert relative(session.logits(PROMPT), expected) < 1e-4


def test_activations_in_int8_need_one_scale_for_each_output(checkpoint: Path, tmp_path: Path) -> None:
    out = shard(checkpoint, tmp_path / "out", "int4", 1)
    options = ("--activations", "int8", "--prompt-ids", "3,4")
    refuse(tmp_path, run, "--shards", out, *options, says=["these are int4 in groups of 32"])
