"""Meta's own checkpoints: merged from any number of parts they are the weights they were made from, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke, notes, refuse_source
from meta_format import edit_part, meta_logits, meta_tensors, params_of, write_meta
from models import edit_json, make_model, snapshot
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from converters.cli import command as convert
from converters.console.errors import InputError, MissingTensor, UnexpectedTensor, UnmappedTensor
from converters.model.families.presets import PRESETS
from converters.model.parameters import parameters
from converters.model.rope import Llama3Scaling
from converters.sources.meta.params import Params
from converters.sources.meta.source import open_meta
from converters.sources.opening import open_source
from quantize.cli import command as quantize

# 8 heads of 6 dimensions; 2/3 of 4 * 48 is 128, a multiple of 4; 208 = 8 * 26 tokens.
SIZES: dict[str, Any] = {"heads": 8, "hidden": 48, "ffn": 128, "vocab": 208}
WQ = "layers.1.attention.wq.weight"


def model_of(root: Path, **changes: Any) -> LlamaForCausalLM:
    return make_model(root / "transformers", **SIZES | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return model_of(tmp_path_factory.mktemp("meta"), kv_heads=4)


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    assert got.dtype == expected.dtype
    return torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


# --- values


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("kv_heads", [8, 1])
def test_converted_back_bit_for_bit(parts: int, embedding_axis: int, kv_heads: int, tmp_path: Path) -> None:
    kv_heads = max(kv_heads, parts)  # each part has whole KV heads
    expected = model_of(tmp_path, kv_heads=kv_heads)
    write_meta(tmp_path / "meta", expected, parts, embedding_axis)
    before = snapshot(tmp_path / "meta")
    invoke(convert, "--source", tmp_path / "meta", "--out", tmp_path / "out", "--dtype", "float32")
    assert snapshot(tmp_path / "meta") == before
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert got.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert same_bits(got.state_dict()[name], tensor), name
    for field in ("hidden_size", "intermediate_size", "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps"):
        assert getattr(got.config, field) == getattr(expected.config, field), field


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_logits_are_those_of_metas_model(kv_heads: int, tmp_path: Path) -> None:
    """What transformers computes from our checkpoint is what the model's definition makes of Meta's tensors."""
    model = model_of(tmp_path, kv_heads=kv_heads)
    write_meta(tmp_path / "meta", model, 2)
    invoke(convert, "--source", tmp_path / "meta", "--out", tmp_path / "out", "--dtype", "float32")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    parts = [torch.load(tmp_path / "meta" / f"consolidated.0{n}.pth", weights_only=True) for n in range(2)]
    whole = {}
    for name, tensor in meta_tensors(model).items():
        axis = [a for a in range(tensor.dim()) if parts[0][name].shape[a] != tensor.shape[a]]
        whole[name] = torch.cat([part[name] for part in parts], axis[0]) if axis else parts[0][name]
    tokens = torch.randint(208, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = meta_logits(whole, params_of(model), tokens)
        torch.testing.assert_close(converted(tokens[None]).logits[0], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_dtype(dtype: str, tmp_path: Path) -> None:
    expected = model_of(tmp_path, kv_heads=2, dtype=dtype)
    source = open_source(write_meta(tmp_path / "meta", expected, 2))
    assert source.config.dtype == dtype
    for name, tensor in expected.state_dict().items():
        assert same_bits(source.rows(name, 0, len(tensor)), tensor), name


def test_mixed_dtypes_are_read_as_the_widest(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 2)
    for number in range(2):
        edit_part(tmp_path / "meta", number, norm__weight=model.model.norm.weight.data.bfloat16())
    assert open_source(tmp_path / "meta").config.dtype == "float32"


@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_rows_are_slices_of_the_whole(embedding_axis: int, model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Ranges within a part, over several, and within a head, whose rows stand in another order."""
    source = open_meta(write_meta(tmp_path / "meta", model, 4, embedding_axis))
    for name, tensor in model.state_dict().items():
        for start, stop in ((0, 1), (1, 5), (5, 7), (11, 14), (3, len(tensor) - 2), (len(tensor) - 1, len(tensor))):
            assert same_bits(source.rows(name, start, stop), tensor[start:stop]), (name, start, stop)


def test_frequencies_in_the_files_are_left_out(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Where LLaMA 1 and where LLaMA 2 keep them; only some of the parts may have them."""
    write_meta(tmp_path / "meta", model, 2)
    edit_part(tmp_path / "meta", 0, layers__0__attention__inner_attention__rope__freqs=torch.ones(3))
    edit_part(tmp_path / "meta", 1, rope__freqs=None)
    source = open_meta(tmp_path / "meta")
    assert {parameter.name for parameter in parameters(source.config)} == set(model.state_dict())


def test_parts_saved_as_views_of_larger_tensors(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """torch.save keeps the strides: a part may have been saved as the transpose of what its storage holds."""
    write_meta(tmp_path / "meta", model, 2)
    for number in range(2):
        path = tmp_path / "meta" / f"consolidated.{number:02d}.pth"
        content = torch.load(path, weights_only=True)
        torch.save({name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in content.items()}, path)
    source = open_meta(tmp_path / "meta")
    for name, tensor in model.state_dict().items():
        assert same_bits(source.rows(name, 0, len(tensor)), tensor), name


def test_whole_chain(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Dry run, tokenizer.model, a second run, and quantizing the directory as it is."""
    write_meta(tmp_path / "meta", model, 4)
    tokenizer = b"\x0a\x03\x0a\x01a\x12\x02\x18\x02"  # SentencePiece's: one piece, BPE
    (tmp_path / "meta" / "tokenizer.model").write_bytes(tokenizer)
    arguments = ("--source", tmp_path / "meta", "--out", tmp_path / "out")
    assert "model-00001-of-00001.safetensors" in invoke(convert, *arguments, "--dry-run").stdout
    assert not (tmp_path / "out").exists()
    assert "meta, 2 layers" in invoke(convert, *arguments).stdout
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer
    assert "already complete" in invoke(convert, *arguments).stdout
    for source in ("meta", "out"):
        invoke(quantize, tmp_path / source, "--int8", "--chips", 2, "--out", tmp_path / f"{source}-shards")
        assert (tmp_path / f"{source}-shards" / "chip-01-of-02.safetensors").exists()
        assert (tmp_path / f"{source}-shards" / "tokenizer.model").exists()


def test_fingerprint_follows_parts_and_params(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 2)
    prints = [open_meta(tmp_path / "meta").fingerprint() for _ in range(2)]
    assert prints[0] == prints[1]
    edit_json(tmp_path / "meta" / "params.json", lambda params: params.update(norm_eps=1e-6))
    prints.append(open_meta(tmp_path / "meta").fingerprint())
    wq = torch.load(tmp_path / "meta" / "consolidated.01.pth", weights_only=True)[WQ]
    edit_part(tmp_path / "meta", 1, **{WQ.replace(".", "__"): wq + 1})
    prints.append(open_meta(tmp_path / "meta").fingerprint())
    assert len(set(prints)) == 3


# --- params.json


def test_config_of_llama_1_and_2(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = open_meta(write_meta(tmp_path / "llama-2", model, 2)).config
    assert (config.name, config.vocab_size, config.rope_theta, config.rope_scaling) == ("llama-2", 208, 10000.0, None)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 6)
    assert (config.bos_token_id, config.eos_token_ids, config.max_position_embeddings) == (1, (2,), 2048)


# Params of the published models, and the preset that each is.
PUBLISHED = {
    "7B": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
    "13B": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-06, "vocab_size": -1},
    "33B": {"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-06, "vocab_size": -1},
    "65B": {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-06, "vocab_size": -1},
    "llama-2-70b": {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
        "norm_eps": 1e-05, "vocab_size": -1,
    },
    "code-llama-34b": {
        "dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 256, "ffn_dim_multiplier": 1.0,
        "norm_eps": 1e-05, "rope_theta": 1000000,
    },
    "llama-3-8b": {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
    },
    "llama-3-70b": {
        "dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
    },
    "llama-3-405b": {
        "dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 4096,
        "ffn_dim_multiplier": 1.2, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_of_published_models_are_the_presets(name: str) -> None:
    """All but what params.json doesn't say of LLaMA 1 and 2: their context."""
    preset = PRESETS[name]
    config = Params(**PUBLISHED[name]).config(name, preset.vocab_size)
    if preset.max_position_embeddings == 4096:
        config = replace(config, max_position_embeddings=4096)
    if name.startswith("llama-3-") and not preset.rope_scaling:
        config = replace(config, eos_token_ids=preset.eos_token_ids)  # 3.0 has no <|eom_id|>
    assert config == preset


@pytest.mark.parametrize(
    ("dim", "layers", "factor"), [(4096, 32, 8.0), (2048, 16, 32.0), (3072, 28, 32.0), (48, 2, 8.0)]
)
def test_rope_scaling_of_llama_3_1_and_3_2(dim: int, layers: int, factor: float) -> None:
    params = Params(dim, layers, 8, rope_theta=5e5, use_scaled_rope=True)
    assert params.config("x", 128256).rope_scaling == Llama3Scaling(factor, 1.0, 4.0, 8192)
    assert params.config("x", 128256).max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("fields", "scaling", "says"),
    [
        ({}, None, None),
        ({"use_scaled_rope": True}, (8.0, 4.0), "no LLaMA is known with dim 48 and n_layers 2: RoPE is scaled by 8"),
        ({"use_scaled_rope": True, "rope_scaling_factor": 16}, (16.0, 4.0), None),
        ({"use_scaled_rope": True, "rope_scaling_factor": 32.0, "rope_high_freq_factor": 2}, (32.0, 2.0), None),
        ({"use_scaled_rope": True, "rope_high_freq_factor": 2}, (8.0, 2.0), "RoPE is scaled by 8"),
        ({"use_scaled_rope": True, "rope_scaling_factor": None}, (8.0, 4.0), "RoPE is scaled by 8"),
        ({"rope_scaling_factor": 16}, None, "has rope_scaling_factor without use_scaled_rope; it is ignored"),
        ({"use_scaled_rope": False, "rope_high_freq_factor": 2}, None, "rope_high_freq_factor without"),
    ],
    ids=str,
)
def test_rope_factors_of_params_json(
    fields: dict[str, Any], scaling: tuple[float, float] | None, says: str | None, tmp_path: Path,
    model: LlamaForCausalLM,
) -> None:  # fmt: skip
    """What params.json says counts; a factor that is guessed is said. The frequencies are held against transformers."""
    write_meta(tmp_path / "meta", model, 2, **fields)
    printed = invoke(convert, "--source", tmp_path / "meta", "--out", tmp_path / "out").stderr
    assert says in printed if says else "params.json" not in printed
    config = AutoConfig.from_pretrained(tmp_path / "out")
    rotary = LlamaRotaryEmbedding(config).inv_freq.double()
    plain = 10000.0 ** -(torch.arange(0, 6, 2).double() / 6)
    torch.testing.assert_close(rotary, plain if scaling is None else _scaled(plain, *scaling))


def _scaled(frequencies: torch.Tensor, factor: float, high: float) -> torch.Tensor:
    """Meta's rule, by wave lengths: those below 8192 / high stay, those above 8192 are ``factor`` times as long."""
    lengths = 2 * torch.pi / frequencies
    smooth = ((8192 / lengths - 1) / (high - 1)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dim": 47}, ["params.json: dim 47 is no multiple of n_heads 8"]),
        ({"dim": "48"}, ["params.json: dim is '48'"]),
        ({"dim": None}, ["params.json lacks dim"]),
        ({"n_layers": 0}, ["n_layers is 0"]),
        ({"n_heads": 8.0}, ["n_heads is 8.0"]),
        ({"n_kv_heads": 3}, ["params.json", "multiple of num_key_value_heads 3"]),
        ({"multiple_of": 0}, ["multiple_of is 0"]),
        ({"ffn_dim_multiplier": "1"}, ["ffn_dim_multiplier is '1'"]),
        ({"norm_eps": -1}, ["params.json", "norm_eps is -1"]),
        ({"rope_theta": []}, ["rope_theta is []"]),
        ({"use_scaled_rope": 1}, ["use_scaled_rope is 1"]),
        ({"vocab_size": 209}, ["params.json", "vocab_size is 209 and the embedding has 208 rows"]),
        ({"ffn_dim_multiplier": 1.3}, ["a feed-forward layer of 128 over all parts", "params.json make 168"]),
        ({"n_kv_heads": 8}, ["layers.0.attention.wk.weight in shape [12, 48]; [48, 48] in 2 parts", "[24, 48] each"]),
        ({"dim": 96, "n_heads": 16}, ["lacks consolidated.02.pth, consolidated.03.pth"]),
        ({"dim": 32}, ["consolidated.00.pth", "24 rows of", "can't be a part of 32"]),
        ({"moe": {"num_experts": 8}}, ["'moe'", "Hugging Face"]),
        ({"sliding_window": 4096}, ["'sliding_window'"]),
        ({"rope_scaling_factor": 0.5}, ["rope_scaling_factor is 0.5"]),
        ({"use_scaled_rope": True, "rope_scaling_factor": "16"}, ["rope_scaling_factor is '16'"]),
        ({"use_scaled_rope": True, "rope_high_freq_factor": 1}, ["params.json", "high_freq_factor 1"]),
        ({"use_scaled_rope": True, "rope_low_freq_factor": 2}, ["'rope_low_freq_factor'"]),
    ],
    ids=str,
)
def test_params_that_are_refused(
    fields: dict[str, Any], says: list[str], model: LlamaForCausalLM, tmp_path: Path
) -> None:
    write_meta(tmp_path / "meta", model, 2, **fields)
    refuse_source(tmp_path, *says, source="meta")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "7", '{"dim": 48}'])
def test_params_that_are_none(text: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 1)
    (tmp_path / "meta" / "params.json").write_text(text)
    refuse_source(tmp_path, "params.json", source="meta")


# --- parts


def opening_raises(kind: type[InputError], root: Path, *says: str) -> None:
    with pytest.raises(InputError) as error:
        open_meta(root / "meta")
    assert error.type is kind
    refuse_source(root, *says, source="meta")


@pytest.mark.parametrize("lost", [[0], [1], [1, 2], [3], [2, 3]], ids=str)
def test_missing_part(lost: list[int], model: LlamaForCausalLM, tmp_path: Path) -> None:
    """A gap shows in the numbers; that the last ones are missing, in the sizes of the others."""
    write_meta(tmp_path / "meta", model, 4)
    for number in lost:
        (tmp_path / "meta" / f"consolidated.{number:02d}.pth").unlink()
    opening_raises(InputError, tmp_path, f"lacks consolidated.{lost[0]:02d}.pth")


def test_no_parts_and_no_params(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 1)
    (tmp_path / "meta" / "params.json").rename(tmp_path / "params.json")
    opening_raises(InputError, tmp_path, "without params.json")
    (tmp_path / "meta" / "consolidated.00.pth").unlink()
    (tmp_path / "params.json").rename(tmp_path / "meta" / "params.json")
    opening_raises(InputError, tmp_path, "lacks consolidated.00.pth")
    (tmp_path / "meta" / "params.json").unlink()
    refuse_source(tmp_path, "no config.json, nor Meta's params.json", source="meta")


def test_more_parts_than_their_sizes_allow(model: LlamaForCausalLM, tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "meta", model, 2)
    shutil.copy(meta / "consolidated.01.pth", meta / "consolidated.02.pth")
    opening_raises(InputError, tmp_path, "3 parts, and by their size the checkpoint has 2", "consolidated.02.pth")


def test_part_of_another_split(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 2)
    other = write_meta(tmp_path / "other", model, 4)
    shutil.copy(other / "consolidated.01.pth", tmp_path / "meta")
    opening_raises(InputError, tmp_path, "consolidated.01.pth holds tok_embeddings.weight in shape [208, 12]")


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.attention_norm.weight", "layers.0.ffn_norm.weight"])
def test_part_of_another_checkpoint(name: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The same sizes, but what every part holds whole isn't the same: one value, by a tenth."""
    write_meta(tmp_path / "meta", model, 4)
    norm = torch.load(tmp_path / "meta" / "consolidated.02.pth", weights_only=True)[name]
    norm[norm.abs().argmax()] *= 0.9
    edit_part(tmp_path / "meta", 2, **{name.replace(".", "__"): norm})
    opening_raises(InputError, tmp_path, f"consolidated.02.pth holds another {name} than consolidated.00.pth")


@pytest.mark.parametrize(
    ("dtype", "change", "largest"),
    [
        (
            torch.float32,
            lambda norm: norm.view(torch.int32)[-1:].bitwise_xor_(1),
            (1e-8, 2.4e-7),
        ),  # the last bit of one value
        (
            torch.bfloat16,
            lambda norm: norm.view(torch.int16).add_(1),
            (2**-8, 2**-7),
        ),  # a unit in the last place of all
        (torch.bfloat16, lambda norm: norm.view(torch.int16)[::3].sub_(2), (2**-7, 2**-6)),
        (torch.float16, lambda norm: norm.view(torch.int16)[1::2].add_(2), (2**-10, 2**-9)),
        (torch.float32, lambda norm: norm.mul_(1.03), (0.0285, 0.0295)),  # more than rounding
        (torch.float32, lambda norm: norm[:1].add_(0.01 * norm.norm() / len(norm) ** 0.5), (0.001, 0.011)),
        (torch.float32, lambda norm: norm[:1].fill_(0), None),
        (torch.float32, lambda norm: norm[:1].fill_(torch.nan), None),
        (torch.float32, lambda norm: norm[:1].fill_(torch.inf), None),
        (torch.float32, lambda norm: norm.neg_(), None),
        (torch.bfloat16, lambda norm: norm.mul_(1.1), None),
    ],
)
def test_norms_that_drifted_apart(
    dtype: torch.dtype, change: Callable[[torch.Tensor], object], largest: tuple[float, float] | None, tmp_path: Path
) -> None:
    """Small differences, as between LLaMA 3 70B's parts: the first part's norms are taken, and one line says so."""
    expected = model_of(tmp_path, kv_heads=4, dtype=dtype).state_dict()["model.layers.0.input_layernorm.weight"]
    write_meta(tmp_path / "meta", model_of(tmp_path, kv_heads=4, dtype=dtype), 4)
    for number in (1, 3):
        part = torch.load(tmp_path / "meta" / f"consolidated.{number:02d}.pth", weights_only=True)
        norms = {name: part[name].clone() for name in part if name.endswith("norm.weight")}
        for norm in norms.values():
            change(norm)
        edit_part(tmp_path / "meta", number, **{name.replace(".", "__"): norm for name, norm in norms.items()})
    if largest is None:
        opening_raises(InputError, tmp_path, "consolidated.01.pth holds another", "parts of different checkpoints")
        return
    (line,) = notes(invoke(convert, "--source", tmp_path / "meta", "--out", tmp_path / "out"))
    assert "differ in 5 tensors" in line
    assert largest[0] <= float(line.split("by up to ")[1].split()[0]) <= largest[1]
    written = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")["model.layers.0.input_layernorm.weight"]
    assert same_bits(written, expected.to(written.dtype))


def test_frequencies_of_the_parts_may_differ(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """rope.freqs is no weight: it follows from the configuration."""
    write_meta(tmp_path / "meta", model, 2)
    edit_part(tmp_path / "meta", 1, rope__freqs=torch.zeros(3))
    assert not notes(invoke(convert, "--source", tmp_path / "meta", "--out", tmp_path / "out"))


def test_part_in_another_dtype(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 2)
    wq = torch.load(tmp_path / "meta" / "consolidated.01.pth", weights_only=True)[WQ]
    edit_part(tmp_path / "meta", 1, **{WQ.replace(".", "__"): wq.half()})
    opening_raises(InputError, tmp_path, f"consolidated.01.pth holds {WQ} as float16", "as float32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_dtype_that_is_not_read(dtype: torch.dtype, model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 1)
    edit_part(tmp_path / "meta", 0, output__weight=torch.zeros(208, 48, dtype=dtype))
    opening_raises(InputError, tmp_path, "output.weight", str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", ["tok_embeddings.weight", WQ, "layers.0.attention.wq.weight", "output.weight"])
def test_missing_tensor(name: str, number: int, model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 2)
    edit_part(tmp_path / "meta", number, **{name.replace(".", "__"): None})
    opening_raises(MissingTensor, tmp_path, f"consolidated.{number:02d}.pth lacks the tensor", name)


def test_head_is_missing_from_all_parts(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 2)
    for number in range(2):
        edit_part(tmp_path / "meta", number, output__weight=None)
    opening_raises(MissingTensor, tmp_path, "lm_head.weight")


@pytest.mark.parametrize("name", ["layers.0.attention.wq.bias", "layers.0.moe.weight", "xnorm.weight", "vision.weight"])
def test_unmapped_tensor(name: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 1)
    edit_part(tmp_path / "meta", 0, **{name.replace(".", "__"): torch.ones(2)})
    opening_raises(UnmappedTensor, tmp_path, repr(name))


def test_layers_too_many_or_too_few(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 2, n_layers=1)
    opening_raises(UnexpectedTensor, tmp_path, "model.layers.1.", "has 1 layers")
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params_of(model, n_layers=3)))
    opening_raises(MissingTensor, tmp_path, "lacks the tensor model.layers.2.")


@pytest.mark.parametrize("shape", [(), (48,), (208, 48, 1), (0, 48)], ids=str)
@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.attention.wq.weight", "output.weight"])
def test_shapes_that_are_none(name: str, shape: tuple[int, ...], model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 1)
    edit_part(tmp_path / "meta", 0, **{name.replace(".", "__"): torch.zeros(shape)})
    opening_raises(InputError, tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_part(share: float, model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_meta(tmp_path / "meta", model, 2) / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    opening_raises(InputError, tmp_path, "consolidated.01.pth", "can't be loaded safely")


class _Hostile:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


def test_a_part_that_carries_code_is_not_run(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", model, 2)
    torch.save({"norm.weight": _Hostile(tmp_path / "harm")}, tmp_path / "meta" / "consolidated.01.pth")
    opening_raises(InputError, tmp_path, "consolidated.01.pth", "can't be loaded safely")
    assert not (tmp_path / "harm").exists()
