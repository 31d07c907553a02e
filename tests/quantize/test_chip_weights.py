"""A source that is split as it is read gives what its shards hold, without a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from invoke import invoke
from models import make_model, make_opt

from converters.cli import command as convert
from converters.sources.opening import open_source
from quantize.cli import command as quantize
from quantize.shards.chip_weights import SplitSource
from quantize.shards.reading import Shards


@pytest.mark.parametrize("chips", [1, 3, 4])
@pytest.mark.parametrize("model", ["llama", "opt"])
def test_a_split_source_is_its_shards(model: str, chips: int, tmp_path: Path) -> None:
    """Heads of zeros, repeated KV heads and rounded up blocks included, whole and in blocks of rows."""
    if model == "llama":
        sizes = {"heads": 6, "kv_heads": 2, "hidden": 48, "head_dim": 16, "ffn": 71, "vocab": 131}
        make_model(tmp_path / "hf", dtype=torch.bfloat16, **sizes)
    else:
        make_opt(tmp_path / "hf", heads=5, hidden=40, ffn=70, vocab=131, width=23, dtype=torch.bfloat16)
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "checkpoint")
    invoke(quantize, tmp_path / "checkpoint", "--bf16", "--chips", chips, "--out", tmp_path / "out")
    shards, split = Shards(tmp_path / "out"), SplitSource(open_source(tmp_path / "checkpoint"), chips)
    assert split.config.dtype == "bfloat16"
    for name, tensor in shards.tensors.items():
        count = tensor.shape[0]
        assert torch.equal(split.rows(name, 1, count), shards.rows(name, 1, count)), name
        for chip in range(chips):
            wanted = shards.local(name, chip)
            assert torch.equal(split.local(name, chip), wanted), (name, chip)
            blocks = list(split.local_blocks(name, chip, 7 * wanted[0].nbytes))
            assert torch.equal(torch.cat(blocks), wanted), (name, chip)
            assert max(map(len, blocks)) <= 7
    assert {name: each.format.name for name, each in shards.parameters.items()} == dict.fromkeys(
        shards.parameters, split.scheme.default_format.name
    )


def test_a_weight_split_by_its_inputs_is_read_once_for_all_chips(tmp_path: Path) -> None:
    make_model(tmp_path / "hf")
    source = open_source(tmp_path / "hf")
    read: list[tuple[str, int, int]] = []

    class Counting:
        config = source.config

        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            read.append((name, start, stop))
            return source.rows(name, start, stop)

    split = SplitSource(Counting(), 4)
    names = ["model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    for name in names:
        for chip in range(4):
            split.local(name, chip)
    assert read == [(names[0], 0, 48), *((names[1], start, start + 11) for start in range(0, 44, 11))]


def test_it_has_the_dtype_of_its_source(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", dtype=torch.float16)
    split = SplitSource(open_source(tmp_path / "hf"), 2)
    assert split.local("lm_head.weight", 1).dtype == torch.float16
    assert split.local("model.norm.weight", 1).dtype == torch.float16
