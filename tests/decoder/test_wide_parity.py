"""Models wide enough for several tiles to a weight, on both backends, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from invoke import invoke
from models import make_model
from parity import count_greedy, decode, logits_after, reference, relative

from converters.cli import command as convert
from quantize.cli import command as quantize

SIZES = {"heads": 12, "kv_heads": 4, "hidden": 1068, "head_dim": 90, "layers": 1, "ffn": 2100, "vocab": 301}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wide")
    make_model(root / "hf", **SIZES)
    invoke(convert, "--source", root / "hf", "--out", root / "checkpoint", "--dtype", "float32")
    invoke(quantize, root / "checkpoint", "--int8", "--out", root / "out1")
    return root / "checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "chips"), [("xla", 1), ("xla", 2), ("inductor", 1)])
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_wide_weights(checkpoint: Path, backend: str, chips: int, rows: int, tmp_path: Path) -> None:
    """One row, a product for each of a few, and one product for many; prompts in a bucket of 16 tokens or none."""
    invoke(quantize, checkpoint, "--int8", "--chips", chips, "--out", tmp_path / "out")
    model = reference(checkpoint, checkpoint.parent / "out1")
    job = {"shards": tmp_path / "out", "dtype": "float32", "max_seq_len": 48, "buckets": [16], "new_tokens": 8}
    batches = [[PROMPTS[1]] * rows, [PROMPTS[0]] * rows]
    [result] = decode([job | {"batches": batches, "backend": backend}], as_users=True)
    assert result["recompilations"] == 0
    for prompts, logits, ids in zip(batches, result["logits"], result["token_ids"], strict=True):
        theirs = logits_after(model, prompts[0])[-1]
        for row in range(rows):
            assert relative(logits[row], theirs) < 1e-4
            count_greedy(model, prompts[row], ids[row])
