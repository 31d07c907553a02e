"""The LLaMA families and OPT, small, from transformers' files to logits on chips that divide none of their sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from invoke import invoke
from models import edit_json, make_model, make_opt
from parity import count_greedy, decode, logits_after, reference, relative
from transformers import PreTrainedModel

from converters.cli import command as convert
from quantize.cli import command as quantize
from quantize.shards.reading import Shards

ORIGINAL = 16  # the context before RoPE was scaled
LENGTHS = (1, 13, 41, 75)  # of prompts: beyond it, too
NEW_TOKENS = 24
ODD = {"heads": 7, "hidden": 70, "ffn": 173, "vocab": 517}
GROUPED = {"heads": 35, "kv_heads": 5, "hidden": 70, "head_dim": 6, "ffn": 181, "vocab": 523}  # 7 to a KV head
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
POST_NORM = {"do_layer_norm_before": False, "width": 37}  # OPT-350M is the only one of either
# What makes the model, of which sizes, and how RoPE is scaled (None where there is none).
FAMILIES: dict[str, tuple[Callable[..., PreTrainedModel], dict[str, Any], dict[str, Any] | None]] = {
    "llama-1": (make_model, ODD | {"eps": 1e-6}, {}),
    "llama-2-70b": (make_model, GROUPED, {}),
    "llama-3": (make_model, GROUPED | {"theta": 500000.0, "eos": [7, 9]}, LLAMA3),
    "linear": (make_model, ODD | {"kv_heads": 1, "seed": 3}, {"rope_type": "linear", "factor": 8.0}),
    "opt-350m": (make_opt, ODD | POST_NORM, None),
    "opt-6.7b": (make_opt, ODD | {"seed": 1}, None),
    "opt-untied": (make_opt, ODD | {"seed": 2, "tied": False, "width": 83, "_remove_final_layer_norm": True}, None),
    "opt-bare": (make_opt, ODD | {"seed": 3, "enable_bias": False, "layer_norm_elementwise_affine": False}, None),
}


class Family(NamedTuple):
    """A converted model, and transformers' model with what int8 makes of its weights."""

    checkpoint: Path
    model: PreTrainedModel
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    made = {}
    for name, (make, sizes, rope) in FAMILIES.items():
        root = tmp_path_factory.mktemp(name)
        make(root / "hf", **sizes)

        def scale(fields: dict[str, Any], rope: dict[str, Any] | None = rope) -> None:
            fields["rope_parameters"].update(rope)
            fields["max_position_embeddings"] = 8 * ORIGINAL

        if rope is not None:
            edit_json(root / "hf" / "config.json", scale)
        invoke(convert, "--source", root / "hf", "--out", root / "checkpoint", "--dtype", "float32")
        invoke(quantize, root / "checkpoint", "--int8", "--out", root / "one")
        model = reference(root / "hf", root / "one")  # of the source: whatever conversion did to RoPE would show
        if rope is not None:
            assert model.config.rope_parameters["rope_type"] == rope.get("rope_type", "default")
        generator = torch.Generator().manual_seed(len(made))
        prompts = [torch.randint(3, sizes["vocab"], (length,), generator=generator).tolist() for length in LENGTHS]
        made[name] = Family(root / "checkpoint", model, prompts)
    return made


@pytest.mark.parametrize(
    ("backend", "chips"), [("eager", 1), *(pytest.param("xla", chips, marks=pytest.mark.slow) for chips in (1, 2, 3))]
)
def test_logits_are_those_of_transformers(
    families: dict[str, Family], backend: str, chips: int, tmp_path: Path
) -> None:
    """Within 1e-4 of transformers with the dequantized weights, and so greedily the same tokens."""
    jobs = []
    for name, family in families.items():
        invoke(quantize, family.checkpoint, "--int8", "--chips", chips, "--out", tmp_path / name)
        config = Shards(tmp_path / name).config
        assert not any(size % 2 == 0 or size % 3 == 0 for size in (config.intermediate_size, config.vocab_size))
        assert not any(heads % 2 == 0 or heads % 3 == 0 for heads in (config.num_heads, config.num_kv_heads))
        sizes = {"new_tokens": NEW_TOKENS, "max_seq_len": 8 * ORIGINAL, "buckets": [16, 32]}
        batches = [[prompt] for prompt in family.prompts]
        jobs.append({"shards": tmp_path / name, "dtype": "float32", "backend": backend, "batches": batches, **sizes})
    compared = 0
    for (name, family), result in zip(families.items(), decode(jobs), strict=True):
        assert result["recompilations"] == 0
        for prompt, logits, ids in zip(family.prompts, result["logits"], result["token_ids"], strict=True):
            error = relative(logits[0], logits_after(family.model, prompt)[-1])
            assert error < 1e-4, (name, len(prompt))
            compared += count_greedy(family.model, prompt, ids[0])
    assert compared >= len(families) * len(LENGTHS) * NEW_TOKENS // 2
