"""A real model through conversion: transformers loads the result as it is, and continues text as it should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from invoke import invoke
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from converters.cli import command as convert

# What transformers continues with, greedily and in float32, given its own reading of the GGUF file.
CAPITAL = ([504, 3575, 282, 4649, 314], [7042, 30, 198, 198, 504, 2988, 314, 42])
GIRL = (
    "Once upon a time, there was a little girl named",
    " Emma who loved to play in the sun. She would often go to the beach and play with her friends. One day",
)


@pytest.fixture(scope="module")
def converted(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint by dtype."""
    outs = {dtype: tmp_path_factory.mktemp("smollm2") / dtype for dtype in ("float32", "bfloat16")}
    for dtype, out in outs.items():
        invoke(convert, "--source", smollm2_gguf, "--dtype", dtype, "--out", out, "--max-shard-size", "200MB")
    return outs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_every_weight_is_what_transformers_reads(converted: dict[str, Path], smollm2_gguf: Path, name: str) -> None:
    dtype = getattr(torch, name)
    model = AutoModelForCausalLM.from_pretrained(converted[name], dtype=dtype)
    with torch.device("meta"):
        blank = LlamaForCausalLM(LlamaConfig(**model.config.to_dict()))
    theirs = load_gguf_checkpoint(str(smollm2_gguf), return_tensors=True, model_to_load=blank)["tensors"]
    ours = model.state_dict()
    assert len(theirs) == 272
    for tensor_name, tensor in theirs.items():
        assert torch.equal(ours[tensor_name], torch.as_tensor(tensor).to(dtype)), tensor_name


@pytest.mark.slow
def test_greedy_ids_and_text_are_the_reference(converted: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted["float32"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(converted["float32"])
    assert tokenizer("The capital of France is").input_ids == CAPITAL[0]
    out = model.generate(torch.tensor([CAPITAL[0]]), max_new_tokens=len(CAPITAL[1]), do_sample=False)
    assert out[0, len(CAPITAL[0]) :].tolist() == CAPITAL[1]
    ids = torch.tensor([tokenizer(GIRL[0]).input_ids])
    out = model.generate(ids, max_new_tokens=len(tokenizer(GIRL[1]).input_ids), do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == GIRL[1]
