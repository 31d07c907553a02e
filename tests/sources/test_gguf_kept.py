"""GGUF's Q8_0 and Q4_0 in shards as they are, in float16 scales of 32 inputs, also where rows are interleaved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import random_tensors, write
from invoke import invoke, notes, refuse
from models import stored

from converters.cli import command as convert
from quantize.cli import command as quantize
from quantize.shards.reading import Shards

KINDS = {Type.Q8_0: "int8-g32-f16", Type.Q4_0: "int4-g32-f16"}


@pytest.mark.parametrize("chips", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_kept_bit_for_bit(kind: Type, chips: int, tmp_path: Path) -> None:
    """The shards stand for just what the gguf library dequantizes."""
    path = write(tmp_path / "model.gguf", random_tensors(kind))
    invoke(convert, "--source", path, "--out", tmp_path / "plain", "--dtype", "float32")
    expected = stored(tmp_path / "plain")
    said = notes(invoke(quantize, path, "--keep", "--chips", chips, "--out", tmp_path / "out"))
    assert any(f"{KINDS[kind]} values and scales are kept as the source has them" in line for line in said)
    shards = Shards(tmp_path / "out")
    assert shards.scheme.default == KINDS[kind]
    assert shards.scheme.quantize_lm_head
    assert not shards.scheme.overrides
    for name, tensor in expected.items():
        assert torch.equal(shards.dequantized(name, 0, len(tensor)).float(), tensor), name


def test_rows_that_begin_within_a_head(tmp_path: Path) -> None:
    from converters.sources.opening import open_source

    source = open_source(write(tmp_path / "model.gguf", random_tensors(Type.Q4_0)))
    name = "model.layers.1.self_attn.q_proj.weight"
    values, scale, _ = source.coded(name, 37, 101)
    exact = values.float() * scale.float().repeat_interleave(32, 1)
    assert torch.equal(exact, source.rows(name, 37, 101))


def test_other_types_are_not_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", random_tensors(Type.Q4_1))
    line = refuse(tmp_path, quantize, path, "--keep", "--out", tmp_path / "out")
    assert "only Q8_0 and Q4_0 are integers times one scale" in line
    said = notes(invoke(quantize, path, "--int8", "--out", tmp_path / "out"))
    assert any("A second rounding, from the source's GGUF type Q4_1, to int8" in line for line in said)
