"""``--dtype float32`` is float32 on a TPU too, whose products of float32 are by default those of bfloat16."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from invoke import SUPPORT, invoke
from models import make_model, make_opt

from quantize.cli import command as quantize

CHIPS, LAYERS = 4, 2
# A layer's are qkv, two of attention, o, gate with up (of OPT the first linear), down. Filling a cache takes no more of
# the last layer than keys and values. The other two graphs have the head as well.
COUNTS = (6 * LAYERS - 5, 6 * LAYERS - 5, 6 * LAYERS + 1, 6 * LAYERS + 1)
EXACT = "operand_precision={highest,highest}"


@pytest.fixture(scope="module", params=["llama", pytest.param("opt", marks=pytest.mark.slow)])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The plan's graphs by dtype, the compiled step, and under ``run`` what XLA was given in a run."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        make_model(root / "hf", heads=8, kv_heads=4, hidden=64, head_dim=16, layers=LAYERS, ffn=96, vocab=224)
    else:
        make_opt(root / "hf", heads=8, hidden=64, layers=LAYERS, ffn=96, vocab=224)
    invoke(quantize, root / "hf", "--int8", "--chips", CHIPS, "--out", root / "out")
    child = SUPPORT / "child_precision.py"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={root / 'dump'} --xla_dump_hlo_as_text"
    words = [sys.executable, child, root / "out", root / "result.json"]
    subprocess.run(words, check=True, timeout=600, env=os.environ | {"XLA_FLAGS": flags})
    given = sorted((root / "dump").glob("*SyncTensorsGraph*before_optimizations.txt"))
    return json.loads((root / "result.json").read_text()) | {"run": [path.read_text() for path in given]}


def products(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(r" = \S+ (dot|convolution)\(", line)]


def test_every_product_of_a_float32_plan_is_exact(graphs: dict) -> None:
    """Linears, both products of attention, and the head."""
    for text, count in zip(graphs[str(torch.float32)], COUNTS, strict=True):
        found = products(text)
        assert len(found) == count
        assert not [line for line in found if EXACT not in line]


def test_no_product_of_a_bfloat16_plan_is_other_than_by_default(graphs: dict) -> None:
    for text, count in zip(graphs[str(torch.bfloat16)], COUNTS, strict=True):
        assert len(products(text)) == count
        assert "operand_precision" not in text


def test_a_run_gives_xla_the_same(graphs: dict) -> None:
    """Each dtype's bucket, later sections and step, one dtype after the other in one process."""
    exact = {True: 0, False: 0}
    for text in graphs["run"]:
        found = products(text)
        if found:
            is_float32 = "bf16[" not in text
            assert {EXACT in line for line in found} == {is_float32}
            exact[is_float32] += 1
    assert exact == {True: 3, False: 3}


def test_exact_attention_keeps_heads_on_their_chips(graphs: dict) -> None:
    """By the TPU's compiler: two all-reduces a layer and one for the embedding, as in bfloat16; nothing is gathered."""
    program = graphs["compiled"]
    entry = program["text"][program["text"].index("\nENTRY ") :]
    assert len(re.findall(r" all-reduce(?:-start)?\(", entry)) <= 2 * LAYERS + 3
    assert len(re.findall(r" all-gather(?:-start)?\(", entry)) <= 2
    assert not re.search(r" (all-to-all|collective-permute)(-start)?\(", entry)
