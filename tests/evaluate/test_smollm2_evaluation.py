"""A real model over a novel: the figures that transformers' logits give, against the GGUF file that it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import virtual_chips
from divergence import expected, expected_against
from invoke import invoke
from parity import reference
from tokenizer_models import novel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from converters.cli import command as convert
from quantize.cli import command as quantize
from runtime.evaluate.evaluate import evaluate

WINDOW, TOKENS = 200, 470


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "chips"), [("eager", 1), ("xla", 4)])
def test_int8_against_its_source(smollm2_gguf: Path, backend: str, chips: int, tmp_path: Path) -> None:
    """9 heads and 3 KV heads, padded on 4 chips; tied embeddings; a checkpoint's tokenizer made from the same file."""
    invoke(convert, "--source", smollm2_gguf, "--out", tmp_path / "checkpoint", "--dtype", "float32")
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--chips", chips, "--out", tmp_path / "out")
    text = "\n".join(novel()[200:260])
    tokens = Tokenizer.from_file(str(tmp_path / "checkpoint" / "tokenizer.json")).encode(text).ids[:TOKENS]
    assert len(tokens) == TOKENS
    virtual_chips.start()
    found = evaluate(tmp_path / "out", tokens, against=smollm2_gguf, backend=backend, window=WINDOW).to_json()
    model = reference(tmp_path / "checkpoint", tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).eval()
    assert found["perplexity"] == pytest.approx(expected(model, tokens, WINDOW)[0], rel=1e-4)
    wanted = expected_against(model, whole, tokens, WINDOW)
    assert {name: found["against"][name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    assert 0.001 < found["against"]["kl_mean"] < 0.01
    assert found["recompilations"] == 0
