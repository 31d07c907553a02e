"""A chip's file of a model of 175B's width, from its seed, held against arithmetic in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from invoke import invoke
from safetensors import safe_open

from converters.cli import command as convert
from converters.sources.opening import open_source
from quantize.cli import command as quantize


@pytest.mark.slow
def test_one_chip_of_eight_at_full_width(tmp_path: Path) -> None:
    """Every byte of three tensors: float64 division rounded to float32 is float32 division, then half to even."""
    invoke(convert, "--config", "175B", "--storage", "seed", "--out", tmp_path / "checkpoint")
    arguments = ("--int8", "--chips", 8, "--only-chip", 0, "--layers", 1)
    invoke(quantize, tmp_path / "checkpoint", *arguments, "--out", tmp_path / "out")
    source = open_source(tmp_path / "checkpoint")
    with safe_open(tmp_path / "out" / "chip-00-of-08.safetensors", "pt") as file:
        for name, rows, columns in (
            ("self_attn.q_proj", 12288 // 8, 12288),
            ("self_attn.o_proj", 12288, 12288 // 8),
            ("mlp.down_proj", 12288, 32768 // 8),
        ):
            full = f"model.layers.0.{name}.weight"
            values, scales = file.get_tensor(full), file.get_tensor(f"{full}_scale")
            assert values.shape == (rows, columns)
            for start in range(0, rows, 1024):  # a whole tensor in float64 would take gigabytes
                stop = min(start + 1024, rows)
                exact = source.rows(full, start, stop).double()
                scale = (exact.abs().amax(1, keepdim=True) / 127).float()
                assert torch.equal(scales[start:stop], scale)
                expected = (exact[:, :columns] / scale.double()).float().round().to(torch.int8)
                assert torch.equal(values[start:stop], expected)
