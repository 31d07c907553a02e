"""Rows of quantized weights that begin and end anywhere: within words, blocks, groups of outputs and stripes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed import by_the_library, described
from gptq_awq import awq_of, awq_settings, gptq_of, gptq_settings
from quantized import DOWN, Stored, write_quantized

from converters.sources.codes import CodedSource
from converters.sources.huggingface.quantized import stripes
from converters.sources.opening import open_source

RANGES = ((0, 64), (5, 6), (7, 29), (31, 33), (40, 64))


def reversed_groups(_: str, weight: torch.Tensor) -> Stored:
    return gptq_of(weight, 3, order=torch.arange(weight.shape[1]).flip(0))


SOURCES = {
    "gptq": (gptq_settings(bits=3, desc_act=True), reversed_groups),
    "awq": (awq_settings(), lambda _, weight: awq_of(weight)),
} | {
    name: (described((name, ["Linear"])), by_the_library(name, torch.bfloat16))
    for name in ("packed4-zp", "packed8-g32-zp", "int8-tensor", "fp8-blocks", "nvfp4")
}


@pytest.mark.parametrize("stripe_bytes", [16 << 20, 999])
@pytest.mark.parametrize("name", SOURCES)
def test_rows_from_anywhere(name: str, stripe_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stripes, "_STRIPE_BYTES", stripe_bytes)
    expected = write_quantized(tmp_path / "hf", *SOURCES[name], layers=1)[DOWN]
    source = open_source(tmp_path / "hf")
    assert isinstance(source, CodedSource)
    for start, stop in RANGES:
        assert torch.equal(source.rows(DOWN, start, stop), expected[start:stop])
        if not isinstance(source.coding(DOWN), str):
            values, scale, zeros = source.coded(DOWN, start, stop)
            exact = values.float() if zeros is None else values.float() - _wide(zeros.float())
            assert torch.equal(exact * _wide(scale.float()), expected[start:stop])


def _wide(columns: torch.Tensor) -> torch.Tensor:
    return columns.repeat_interleave(96 // columns.shape[1], 1)
