"""A conversion held against transformers, which loads the same folder: the weights, RoPE's frequencies, the logits."""

from __future__ import annotations

from pathlib import Path

import torch
from invoke import invoke, notes
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters.cli import command as convert

_PROMPT = torch.tensor([[1, 5, 9, 3, 17, 30, 2, 8]])


def load(directory: Path) -> PreTrainedModel:
    """What transformers reads, in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


def notes_of(source: Path, out: Path, *options: object) -> list[str]:
    """Convert in float32 and assert that transformers reads the same of both folders.

    Returns the notes but for that on the tokenizer, which these folders don't have.
    """
    said = invoke(convert, "--source", source, "--out", out, "--dtype", "float32", *options)
    assert all(line.startswith("Note: ") for line in said.stderr.splitlines()), said
    theirs, ours = load(source), load(out)
    expected, got = theirs.state_dict(), ours.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    with torch.no_grad():
        logits = [model(_PROMPT, use_cache=False).logits for model in (theirs, ours)]
    assert torch.equal(*logits)
    return notes(said)
