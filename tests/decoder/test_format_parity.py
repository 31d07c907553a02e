"""The decoder with weights in every kind of format against transformers holding what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke
from models import make_model, make_opt
from parity import count_greedy, decode, logits_after, reference, relative
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters.cli import command as convert
from quantize.cli import command as quantize
from quantize.formats.table import FORMATS

NEW_TOKENS = 24
LENGTHS = (1, 9, 20)  # of prompts: none in a bucket of 16, one, two sections
# Groups of 32 lie on two heads of 48, and the feed-forward layer's 11 groups divide by no number of chips.
MODELS = {
    "grouped": {"heads": 6, "kv_heads": 2, "hidden": 96, "head_dim": 48, "layers": 1, "ffn": 352, "vocab": 515},
    # Inputs of 45, 42 and 171 fill no words.
    "odd": {"heads": 3, "kv_heads": 1, "hidden": 45, "head_dim": 14, "layers": 1, "ffn": 171, "vocab": 131},
    "opt": {"heads": 3, "hidden": 96, "layers": 1, "ffn": 224, "vocab": 131},  # with biases
}
TIED = ("odd", "opt")  # the embedding is the output head
FORMATS_OF = {
    "grouped": ("int4-g32", "int4-g32-zp", "int8-g32", "int8-g32-zp", "fp8-g32"),
    "odd": ("int4", "int4-zp", "int8-zp", "fp8"),
    "opt": ("int4-g32-zp", "fp8"),
}
PAIRS = [(model, name) for model, names in FORMATS_OF.items() for name in names]


class Made:
    """Checkpoints and references, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._references: dict[tuple[str, str], PreTrainedModel] = {}

    def checkpoint(self, model: str) -> Path:
        """In float32."""
        folder = self._root / model
        if not folder.exists():
            make = make_opt if model == "opt" else make_model
            make(folder / "hf", **MODELS[model], tied=model in TIED)
            invoke(convert, "--source", folder / "hf", "--out", folder / "checkpoint", "--dtype", "float32")
        return folder / "checkpoint"

    def shards(self, model: str, name: str, chips: int) -> Path:
        out = self._root / f"{model}-{name}-{chips}"
        if not out.exists():
            each = FORMATS[name]
            flags = [f"--{each.kind}", "--group-size", each.group_size or "channel"]
            flags += ["--zero-points"] if each.zero_points else []
            flags += [] if model in TIED else ["--quantize-lm-head"]
            invoke(quantize, self.checkpoint(model), *flags, "--chips", chips, "--out", out)
        return out

    def reference(self, model: str, name: str) -> PreTrainedModel:
        """In float32, with the weights of one chip's file."""
        if (model, name) not in self._references:
            self._references[model, name] = reference(self.checkpoint(model), self.shards(model, name, 1))
        return self._references[model, name]

    def exact(self, model: str) -> PreTrainedModel:
        """With the weights that were quantized."""
        return AutoModelForCausalLM.from_pretrained(self.checkpoint(model), dtype=torch.float32).eval()

    def prompts(self, model: str) -> list[list[int]]:
        generator = torch.Generator().manual_seed(len(model))
        return [torch.randint(3, MODELS[model]["vocab"], (length,), generator=generator).tolist() for length in LENGTHS]

    def job(self, model: str, name: str, chips: int, **changes: Any) -> dict[str, Any]:
        sizes = {"dtype": "float32", "new_tokens": NEW_TOKENS, "max_seq_len": 48, "buckets": [16]}
        batches = [[prompt] for prompt in self.prompts(model)]
        return {"shards": self.shards(model, name, chips), "batches": batches, **sizes} | changes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("formats"))


def assert_parity(made: Made, model: str, name: str, chips: int, backend: str) -> None:
    """Logits within 1e-4, the greedy tokens, nothing compiled after warm-up."""
    theirs = made.reference(model, name)
    [result] = decode([made.job(model, name, chips, backend=backend)])
    assert result["recompilations"] == 0
    compared = 0
    for prompt, logits, ids in zip(made.prompts(model), result["logits"], result["token_ids"], strict=True):
        assert relative(logits[0], logits_after(theirs, prompt)[-1]) < 1e-4
        compared += count_greedy(theirs, prompt, ids[0])
    assert compared >= len(LENGTHS) * NEW_TOKENS // 2


def _grid() -> list[Any]:
    """On XLA every format of the list on every number of chips, few of them quick."""
    quick = {
        *(
            ("grouped", "int4-g32", 4),
            ("grouped", "int4-g32-zp", 3),
            ("grouped", "int8-g32", 2),
            ("grouped", "fp8-g32", 3),
        ),
        *(("odd", "int4", 2), ("odd", "int8-zp", 1), ("opt", "fp8", 2)),
    }
    return [
        pytest.param(model, name, chips, marks=() if (model, name, chips) in quick else pytest.mark.slow)
        for chips in (1, 2, 3, 4, 8)
        for model, name in PAIRS
    ]


@pytest.mark.parametrize(("model", "name", "chips"), _grid())
def test_xla_equals_transformers(made: Made, model: str, name: str, chips: int) -> None:
    assert_parity(made, model, name, chips, "xla")


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_eager_equals_transformers(made: Made, model: str, name: str) -> None:
    assert_parity(made, model, name, 1, "eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("grouped", "int4-g32-zp"), ("grouped", "int8-g32"), ("grouped", "fp8-g32")),
        *(("odd", "int4"), ("odd", "int8-zp"), ("opt", "int4-g32-zp")),
    ],
)
def test_inductor_equals_transformers(made: Made, model: str, name: str) -> None:
    assert_parity(made, model, name, 1, "inductor")


@pytest.mark.parametrize(
    ("backend", "chips"),
    [
        ("eager", 1),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("xla", 1), ("xla", 4), ("inductor", 1))),
    ],
)
@pytest.mark.parametrize(
    ("model", "name"), [("grouped", "int4-g32-zp"), ("grouped", "fp8-g32"), ("odd", "int8-zp"), ("opt", "fp8")]
)
def test_bfloat16_is_near(made: Made, model: str, name: str, backend: str, chips: int) -> None:
    """Within 2e-2 of float32, in the programs that users get."""
    job = made.job(model, name, chips, backend=backend, dtype="bfloat16", new_tokens=1)
    [result] = decode([job], as_users=True)
    assert result["recompilations"] == 0
    for prompt, logits in zip(made.prompts(model), result["logits"], strict=True):
        assert relative(logits[0], logits_after(made.reference(model, name), prompt)[-1]) < 2e-2


@pytest.mark.parametrize(("backend", "chips"), [("eager", 1), pytest.param("xla", 3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model", "name"), [("grouped", "int4-g32-zp"), ("opt", "int4-g32-zp"), ("odd", "int4")])
def test_rows_of_a_batch(made: Made, model: str, name: str, backend: str, chips: int) -> None:
    """Rows of different lengths give what the reference gives each alone."""
    prompts = made.prompts(model)
    [result] = decode([made.job(model, name, chips, backend=backend, batches=[prompts])])
    assert result["recompilations"] == 0
    compared = 0
    for prompt, logits, ids in zip(prompts, result["logits"][0], result["token_ids"][0], strict=True):
        assert relative(logits, logits_after(made.reference(model, name), prompt)[-1]) < 1e-4
        compared += count_greedy(made.reference(model, name), prompt, ids)
    assert compared >= len(LENGTHS) * NEW_TOKENS // 2


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_what_rounding_to_a_format_changes_would_be_seen(made: Made, model: str, name: str) -> None:
    """The reference's logits are far from those of the weights before: parity with either could be told apart."""
    exact = made.exact(model)
    for prompt in made.prompts(model):
        assert relative(logits_after(made.reference(model, name), prompt)[-1], logits_after(exact, prompt)[-1]) > 1e-3
