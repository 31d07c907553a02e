"""RoPE frequencies and their scaling against transformers, and the configurations that carry them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke
from models import SMALL, edit_json, make_model, write_hf
from parity import decode, logits_after, reference, relative
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from converters.cli import command as convert
from converters.model.config import ModelConfig
from converters.model.families.hf_config import from_hf, to_hf
from converters.model.families.presets import PRESETS
from converters.model.rope import LinearScaling, Llama3Scaling, RopeScaling, inverse_frequencies
from converters.sources.opening import open_source
from quantize.cli import command as quantize
from quantize.shards.reading import Shards

LLAMA_3_1 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
SCALINGS: list[RopeScaling | None] = [
    None,
    LinearScaling(4.0),
    LLAMA_3_1,
    Llama3Scaling(32.0, 1.0, 4.0, 8192),  # LLaMA 3.2
    Llama3Scaling(2.5, 0.7, 3.0, 100),
]


def config_of(scaling: RopeScaling | None, theta: float, head_dim: int) -> ModelConfig:
    return replace(SMALL, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)


def transformers_frequencies(config: ModelConfig) -> torch.Tensor:
    """What transformers makes of the config.json that we write: float32, [head_dim / 2]."""
    theirs = LlamaConfig(**to_hf(config))
    if config.rope_scaling is None:
        return LlamaRotaryEmbedding(theirs).inv_freq
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[config.rope_scaling.kind](theirs, "cpu")
    assert attention_factor == 1.0
    return frequencies


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(("theta", "head_dim"), [(10000.0, 128), (500000.0, 128), (500000.0, 64), (1e6, 6)])
def test_frequencies_are_those_of_transformers(scaling: RopeScaling | None, theta: float, head_dim: int) -> None:
    config = config_of(scaling, theta, head_dim)
    ours = torch.tensor(inverse_frequencies(config), dtype=torch.float64)
    assert ours.shape == (head_dim // 2,)
    torch.testing.assert_close(ours, transformers_frequencies(config).double(), rtol=1e-6, atol=0)


def test_llama_3_1_keeps_short_waves_and_stretches_long_ones() -> None:
    """The three bands, by the wavelengths that divide them: 8192 / 4 and 8192 / 1 tokens."""
    config = config_of(LLAMA_3_1, 500000.0, 128)
    bands = {"kept": 0, "blended": 0, "stretched": 0}
    for pair, frequency in enumerate(inverse_frequencies(config)):
        plain = 500000.0 ** (-pair / 64)
        wave = 2 * math.pi / plain
        if wave < 2048:
            bands["kept"] += 1
            assert frequency == pytest.approx(plain, rel=1e-14)
        elif wave > 8192:
            bands["stretched"] += 1
            assert frequency == pytest.approx(plain / 8, rel=1e-14)
        else:
            bands["blended"] += 1
            assert plain / 8 < frequency < plain
    assert all(bands.values()), bands


def test_unscaled_and_linear_are_the_closed_formula() -> None:
    expected = [10000.0 ** (-i / 4) for i in range(4)]
    assert inverse_frequencies(config_of(None, 10000.0, 8)) == pytest.approx(expected, rel=1e-15)
    linear = inverse_frequencies(config_of(LinearScaling(2), 10000.0, 8))
    assert linear == pytest.approx([frequency / 2 for frequency in expected], rel=1e-15)


# --- in config.json

LLAMA3_FIELDS = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"rope_scaling": None}, None),
        ({"rope_scaling": {"rope_type": "default"}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, LinearScaling(4.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, LinearScaling(4.0)),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3_FIELDS}}, LLAMA_3_1),
        ({"rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3_FIELDS}}, LLAMA_3_1),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_FIELDS}}, LLAMA_3_1),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}}, None),
        (
            {
                "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "rope_theta": 5e5,
            },
            LinearScaling(4.0),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_both_spellings(fields: dict[str, Any], scaling: RopeScaling | None) -> None:
    config = from_hf(to_hf(SMALL) | ({} if "rope_parameters" in fields else {"rope_theta": 5e5}) | fields)
    assert (config.rope_scaling, config.rope_theta) == (scaling, 5e5)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_config_survives_our_json_and_that_of_transformers(scaling: RopeScaling | None, tmp_path: Path) -> None:
    config = config_of(scaling, 500000.0, 128)
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
    LlamaConfig(**to_hf(config)).save_pretrained(tmp_path)
    saved = from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert (saved.rope_scaling, saved.rope_theta) == (scaling, 500000.0)


def test_no_scaling_is_not_written() -> None:
    assert "rope_scaling" not in to_hf(SMALL)


def test_scaling_goes_through_every_stage(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", rope_scaling={"rope_type": "llama3", **LLAMA3_FIELDS})
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "checkpoint")
    assert open_source(tmp_path / "checkpoint").config.rope_scaling == LLAMA_3_1
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--chips", 2, "--out", tmp_path / "shards")
    assert Shards(tmp_path / "shards").config.rope_scaling == LLAMA_3_1


def test_decoder_scales_as_transformers_does(tmp_path: Path) -> None:
    """Logits of prompts that reach beyond the original context, under either rule."""
    jobs, expected = [], []
    for name, scaling in (
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        ("llama3", {"rope_type": "llama3", **LLAMA3_FIELDS, "original_max_position_embeddings": 16}),
    ):
        make_model(tmp_path / name, kv_heads=2)
        edit_json(tmp_path / name / "config.json", lambda fields, rope=scaling: fields["rope_parameters"].update(rope))
        invoke(quantize, tmp_path / name, "--int8", "--out", tmp_path / f"{name}-out")
        model = reference(tmp_path / name, tmp_path / f"{name}-out")
        assert model.config.rope_parameters["rope_type"] == name
        prompt = list(range(1, 60))
        expected.append(logits_after(model, prompt)[-1])
        sizes = {"new_tokens": 1, "max_seq_len": 64, "buckets": [32], "batches": [[prompt]]}
        jobs.append({"shards": tmp_path / f"{name}-out", "dtype": "float32", "backend": "eager", **sizes})
    for result, logits in zip(decode(jobs), expected, strict=True):
        assert relative(result["logits"][0][0], logits) < 1e-4


def test_presets_are_scaled_as_published() -> None:
    assert {name for name, preset in PRESETS.items() if preset.rope_scaling} == {"llama-3-405b"}
    assert PRESETS["llama-3-405b"].rope_scaling == LLAMA_3_1


# --- Mistral


@pytest.mark.parametrize("window", [None, 512, 4096])
def test_mistral_without_a_window_in_use_is_llama(window: int | None, tmp_path: Path) -> None:
    """The same weights in a Mistral of transformers give the same logits as what we make of them."""
    make_model(tmp_path / "hf", kv_heads=2, theta=1e6)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    config["pretraining_tp"] = 2  # a hint to old versions of transformers how to split matrix products
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", "--dtype", "float32")
    from transformers import AutoModelForCausalLM

    theirs = MistralForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (theirs.config.model_type, ours.config.model_type) == ("mistral", "llama")
    tokens = torch.arange(1, 65)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)


def test_mistral_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = MistralConfig()
    fields = {key: getattr(theirs, key) for key in ("hidden_size", "intermediate_size", "vocab_size")}
    fields |= {"num_hidden_layers": 32, "num_attention_heads": 32, "model_type": "mistral", "sliding_window": None}
    ours = from_hf(fields)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert (ours.norm_eps, ours.head_dim) == (theirs.rms_norm_eps, theirs.head_dim)
    assert theirs.sliding_window == 4096  # so silence asks for a window (test_errors_config.py)
