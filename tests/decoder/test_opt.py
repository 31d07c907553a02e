"""OPT in Hugging Face's layout: converted, refused, run in batches, made at random; logits are in test_families.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke, invoke_error, refuse_source
from models import assert_same_bits, edit_json, make_model, make_opt, snapshot
from parity import count_greedy, decode, logits_after, reference, relative
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTForCausalLM

from converters.cli import command as convert
from converters.console.errors import InputError, MissingTensor, UnexpectedTensor, UnmappedTensor
from converters.model.families.hf_config import from_hf, to_hf
from converters.model.families.presets import PRESETS
from converters.sources.opening import open_source
from converters.sources.random_init import STD, RandomSource
from quantize.cli import command as quantize
from quantize.shards.reading import Shards
from runtime.bench.baseline import load_model
from runtime.cli import command as run
from runtime.devices.host import HostBackend
from runtime.model.device_form import Form
from runtime.plan_cli import command as plan
from runtime.run.generate import Generator
from runtime.run.load import load_decoder, make_cache

POST_NORM: dict[str, Any] = {"do_layer_norm_before": False, "width": 20}
VARIETIES: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": POST_NORM,
    "post-norm-bin": POST_NORM | {"form": "bin", "max_shard_size": "20KB"},
    "untied-bfloat16": {"tied": False, "width": 64, "dtype": "bfloat16", "max_shard_size": "20KB"},
    "no-final-norm": {"_remove_final_layer_norm": True},
    "no-biases": {"enable_bias": False},
    "plain-norms": {"layer_norm_elementwise_affine": False},
    "divisible-by-nothing": {"heads": 3, "hidden": 39, "ffn": 171, "vocab": 515, "positions": 77},
}
FIELDS = (
    *("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "vocab_size", "word_embed_proj_dim"),
    *("max_position_embeddings", "do_layer_norm_before", "_remove_final_layer_norm", "enable_bias", "model_type"),
    *("layer_norm_elementwise_affine", "activation_function", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
)


@pytest.mark.parametrize("variety", VARIETIES)
def test_transformers_reads_the_same_model(variety: str, tmp_path: Path) -> None:
    model = make_opt(tmp_path / "hf", **VARIETIES[variety])
    before = snapshot(tmp_path / "hf")
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", "--dtype", "float32").stdout
    assert f"{model.num_parameters():,} parameters" in said
    assert snapshot(tmp_path / "hf") == before
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert isinstance(converted, OPTForCausalLM)
    assert_same_bits(converted.state_dict(), model.float().state_dict())
    for field in FIELDS:
        assert getattr(converted.config, field) == getattr(model.config, field), field


@pytest.mark.parametrize("options", [[], ["--layers", "1", "--dtype", "float32"]], ids=str)
def test_logits_are_checked(options: list[str], tmp_path: Path) -> None:
    make_opt(tmp_path / "hf", **POST_NORM)
    for source in (("--source", tmp_path / "hf"), ("--config", tmp_path / "hf" / "config.json")):
        said = invoke(convert, *source, "--out", tmp_path / source[0], "--check-logits", *options).stdout
        assert "the same greedy choice after 16 of 16 tokens" in said


def test_a_model_saved_without_its_head(tmp_path: Path) -> None:
    """OPTModel's names have no ``model.``, and older versions of transformers saved fairseq's version number."""
    model = make_opt(tmp_path / "hf")
    tensors = {name.removeprefix("model."): tensor.clone() for name, tensor in model.model.state_dict().items()}
    save_file(tensors | {"decoder.version": torch.ones(1)}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", "--dtype", "float32")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same_bits(converted.state_dict(), model.state_dict())


def test_configuration_that_is_silent() -> None:
    """As the published ones are about what came later; transformers' own defaults."""
    needed = {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = from_hf(needed | {"model_type": "opt", "vocab_size": 50272, "torch_dtype": "bfloat16"}, "opt-125m")
    assert config == PRESETS["opt-125m"]
    assert from_hf(to_hf(config) | {"head_dim": 32}) == config  # which transformers doesn't look at either


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"activation_function": "gelu"}, ["'gelu'", "activation_function", "relu"]),
        ({"do_layer_norm_before": "false"}, ["do_layer_norm_before", "true or false"]),
        ({"enable_bias": 1}, ["enable_bias", "true or false"]),
        ({"layer_norm_elementwise_affine": None}, ["layer_norm_elementwise_affine"]),
        ({"word_embed_proj_dim": 0}, ["word_embed_proj_dim is 0"]),
        ({"num_attention_heads": 5}, ["no multiple of num_attention_heads 5"]),
        ({"max_position_embeddings": -1}, ["max_position_embeddings"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["already quantized by 'bitsandbytes'"]),
        ({"word_embed_proj_dim": 24}, ["embed_tokens.weight", "[211, 48]", "[211, 24]"]),
        ({"max_position_embeddings": 127}, ["embed_positions.weight", "[130, 48]", "[129, 48]"]),
    ],
    ids=str,
)
def test_configurations_that_are_refused(fields: dict[str, Any], says: list[str], tmp_path: Path) -> None:
    make_opt(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", lambda content: content.update(fields))
    if fields.get("word_embed_proj_dim"):
        tensors = load_file(tmp_path / "hf" / "model.safetensors")
        for name, shape in (("project_in", (48, 24)), ("project_out", (24, 48))):
            tensors[f"model.decoder.{name}.weight"] = torch.zeros(shape)
        save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    refuse_source(tmp_path, *says)


@pytest.mark.parametrize("field", ["hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_configuration_that_lacks_a_size(field: str, tmp_path: Path) -> None:
    make_opt(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", lambda content: content.pop(field))
    refuse_source(tmp_path, f"lacks {field}; it is no OPT configuration")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model.decoder.layers.1.fc1.bias": None}, MissingTensor, "layers.1.fc1.bias"),
        ({"model.decoder.final_layer_norm.bias": None}, MissingTensor, "final_layer_norm.bias"),
        ({"model.decoder.project_in.weight": torch.ones(2, 2)}, UnexpectedTensor, "project_in"),
        ({"model.decoder.layers.2.fc1.bias": torch.ones(44)}, UnexpectedTensor, "it has 2 layers"),
        ({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, UnmappedTensor, "not part of a model of OPT"),
        ({"model.decoder.layers.0.fc1.bias": torch.ones(45)}, InputError, "[45]"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(
    change: dict[str, torch.Tensor | None], error: type[Exception], says: str, tmp_path: Path
) -> None:
    make_opt(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(error):
        open_source(tmp_path / "hf")
    refuse_source(tmp_path, says)


def test_biases_in_a_llama_stay_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", lambda content: content.update(attention_bias=True))
    refuse_source(tmp_path, "biases in the attention (attention_bias)")


def test_positions_end(tmp_path: Path) -> None:
    """A context longer than there are learned positions is refused, where one of RoPE's is not."""
    make_opt(tmp_path / "hf", positions=40)
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "out")
    says = "has learned 40 positions, and --max-seq-len is 41"
    arguments = ("--shards", tmp_path / "out", "--max-seq-len", 41)
    assert says in invoke_error(run, *arguments, "--prompt-len", 5, "--backend", "eager")
    assert says in invoke_error(plan, *arguments)
    assert "2048 or less" in invoke_error(plan, "--config", "opt-125m", "--max-seq-len", 2049)
    assert "opt-125m" in invoke(plan, "--max-seq-len", 2048).stdout
    assert "opt-125m" not in invoke(plan, "--max-seq-len", 2049).stdout
    last = ("--shards", tmp_path / "out", "--max-seq-len", 40, "--prompt-len", 5, "--backend", "eager")
    assert "36" in invoke(run, *last, "--max-new-tokens", 100).stdout  # the last new token takes no place


@pytest.mark.parametrize(
    ("backend", "chips", "variety"),
    [
        ("eager", 1, "divisible-by-nothing"),
        ("eager", 1, "post-norm"),
        ("xla", 3, "divisible-by-nothing"),
        pytest.param("xla", 3, "post-norm", marks=pytest.mark.slow),
    ],
)
def test_rows_of_different_lengths(variety: str, backend: str, chips: int, tmp_path: Path) -> None:
    """Shorter rows begin at later slots, and still at position 0; to the last position that there is."""
    make_opt(tmp_path / "hf", **VARIETIES[variety])
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "checkpoint", "--dtype", "float32")
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--chips", chips, "--out", tmp_path / "out")
    model = reference(tmp_path / "hf", tmp_path / "out")
    slots = model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 211, (length,), generator=generator).tolist() for length in (1, 11, slots - 20)]
    job = {"shards": tmp_path / "out", "dtype": "float32", "backend": backend, "batches": [prompts]}
    [result] = decode([job | {"new_tokens": 21, "max_seq_len": slots, "buckets": [16, 32]}])
    assert result["recompilations"] == 0
    for prompt, logits, ids in zip(prompts, result["logits"][0], result["token_ids"][0], strict=True):
        assert relative(logits, logits_after(model, prompt)[-1]) < 1e-4
        assert count_greedy(model, prompt, ids[:20]) >= 10


@pytest.mark.parametrize("fuse_bytes", [None, 0])
@pytest.mark.parametrize("variety", ["divisible-by-nothing", "post-norm"])
def test_in_the_form_for_tpus(variety: str, fuse_bytes: int | None, tmp_path: Path) -> None:
    """A single row is copied, and projections with their biases are put together or not: the same logits."""
    make_opt(tmp_path / "hf", **VARIETIES[variety])
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "checkpoint", "--dtype", "float32")
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out")
    shards, backend = Shards(tmp_path / "out"), HostBackend("eager")
    backend.form, backend.fuse_bytes = Form(least_rows=2), fuse_bytes
    with torch.no_grad():
        decoder, _ = load_decoder(shards, shards.config, torch.float32, backend, lambda *done: None)
        cache = make_cache(shards.config, backend, 1, 40, torch.float32)
        logits = Generator(shards.config, decoder, cache, backend, [16]).logits([[5, 9, 3, 20]])
    expected = logits_after(reference(tmp_path / "hf", tmp_path / "out"), [5, 9, 3, 20])[-1]
    assert relative(logits[0], expected) < 1e-4


def test_biases_keep_their_dtype_and_are_not_quantized(tmp_path: Path) -> None:
    make_opt(tmp_path / "hf")
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "checkpoint", "--dtype", "float16")
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out")
    before = load_file(tmp_path / "checkpoint" / "model-00001-of-00001.safetensors")
    after = load_file(tmp_path / "out" / "chip-00-of-01.safetensors")
    biases = [name for name in before if name.endswith(".bias")]
    assert len(biases) == 2 * (6 + 2) + 1
    assert_same_bits({name: after[name] for name in biases}, {name: before[name] for name in biases})
    int8 = {name for name, tensor in after.items() if tensor.dtype == torch.int8}
    assert len(int8) == 2 * 6
    assert "model.decoder.layers.1.self_attn.out_proj.weight" in int8


def test_shards_are_split_anew(tmp_path: Path) -> None:
    """Biases too: what is made of 8 chips' files is what quantizing for so many chips gives."""
    make_opt(tmp_path / "hf", **VARIETIES["divisible-by-nothing"])
    invoke(quantize, tmp_path / "hf", "--int8", "--chips", 8, "--out", tmp_path / "eight")
    for chips in (1, 2, 5):
        invoke(quantize, tmp_path / "hf", "--int8", "--chips", chips, "--out", tmp_path / f"made{chips}")
        invoke(quantize, tmp_path / "eight", "--int8", "--chips", chips, "--out", tmp_path / f"split{chips}")
        made, split = (snapshot(tmp_path / f"{kind}{chips}") for kind in ("made", "split"))
        weights = [name for name in made if name.endswith(".safetensors")]
        assert len(weights) == chips
        assert {name: split[name] for name in weights} == {name: made[name] for name in weights}


@pytest.mark.parametrize("variety", ["pre-norm", "post-norm"])
def test_random_weights(variety: str, tmp_path: Path) -> None:
    """Norms change nothing at first; every other bias has values of its own, which no other tensor shares."""
    make_opt(tmp_path / "hf", **VARIETIES[variety])
    config = open_source(tmp_path / "hf").config
    source, again = RandomSource(config, 7), RandomSource(config, 7)
    drawn = {}
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        values = source.rows(name, 0, len(tensor))
        assert values.shape == tensor.shape
        assert torch.equal(values, again.rows(name, 0, len(tensor)))
        if "norm" in name:
            assert torch.equal(values, torch.full(tensor.shape, float(name.endswith("weight"))))
        else:
            assert 0.5 * STD < values.std() < 1.5 * STD
            drawn[name] = tuple(values.flatten()[:8].tolist())
    assert len(set(drawn.values())) == len(drawn)


def test_baseline_is_transformers_own_model(tmp_path: Path) -> None:
    make_opt(tmp_path / "hf", **POST_NORM)
    invoke(quantize, tmp_path / "hf", "--int8", "--chips", 3, "--out", tmp_path / "out")
    expected = logits_after(reference(tmp_path / "hf", tmp_path / "out"), [3, 4, 5])
    assert relative(logits_after(load_model(tmp_path / "out", torch.float32, None), [3, 4, 5]), expected) < 1e-6
