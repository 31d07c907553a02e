"""A Hugging Face directory whose tensors, or whose config.json's fields, contradict each other: read as transformers
reads it, with a note of what is left out or guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import load, notes_of
from invoke import invoke, refuse_source
from models import edit_json, make_model, make_opt, random_tensors, snapshot, write_hf
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from converters.cli import command as convert
from converters.model.families.hf_config import from_hf
from converters.model.rope import inverse_frequencies
from converters.sources.opening import open_source

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OPT_EMBEDDING = "model.decoder.embed_tokens.weight"


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Set tensors of model.safetensors, or take those that are None out."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


# --- tensors that no parameter is made of

LAYER = "model.layers.1."
BUFFERS = [
    LAYER + "self_attn.rotary_emb.inv_freq",
    LAYER + "self_attn.rotary_emb.cos_cached",
    LAYER + "self_attn.rotary_emb.sin_cached",
    LAYER + "self_attn.rotary_emb.original_inv_freq",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "rotary_emb.inv_freq",
    "layers.0.self_attn.rotary_emb.inv_freq",
    LAYER + "self_attn.bias",
    LAYER + "self_attn.masked_bias",
    LAYER + "attention.bias",
    LAYER + "attention.masked_bias",
    "model.position_ids",
    "model.causal_mask",
]


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_left_out(name: str, tmp_path: Path) -> None:
    make_model(tmp_path / "hf")
    edit_tensors(tmp_path / "hf", **{name: torch.full((1, 1, 4), 7.0)})
    [note] = notes_of(tmp_path / "hf", tmp_path / "out")
    assert note == f"1 tensor left out: buffers that follow from config.json ({name})."


def test_many_buffers_make_one_note(tmp_path: Path) -> None:
    make_opt(tmp_path / "hf", layers=3)
    extra = {f"model.decoder.layers.{layer}.self_attn.masked_bias": torch.ones(1) for layer in range(3)}
    edit_tensors(tmp_path / "hf", **extra, **{"model.decoder.version": torch.tensor([3.0])})
    [note] = notes_of(tmp_path / "hf", tmp_path / "out")
    assert note.startswith("4 tensors left out: buffers")
    assert note.endswith(", ...).")


@pytest.mark.parametrize("name", ["model.rotary_emb.weight", "model.layers.0.self_attn.inv_freq_proj", "x.inv_freq"])
def test_what_is_no_buffer_is_refused(name: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", random_tensors() | {name: torch.ones(2)})
    refuse_source(tmp_path, name, "not part of a model")


BIASES = {
    "self_attn.q_proj": 48, "self_attn.k_proj": 48, "self_attn.v_proj": 48, "self_attn.o_proj": 48,
    "mlp.gate_proj": 44, "mlp.up_proj": 44, "mlp.down_proj": 48, "input_layernorm": 48,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_biases_of_zeros_that_nobody_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    make_model(tmp_path / "hf")
    biases = {f"{LAYER}{name}.bias": torch.zeros(size, dtype=dtype) for name, size in BIASES.items()}
    biases[f"{LAYER}self_attn.q_proj.bias"] = -biases[f"{LAYER}self_attn.q_proj.bias"]  # zeros of the other sign
    biases["lm_head.bias"] = torch.zeros(211, dtype=dtype)
    edit_tensors(tmp_path / "hf", **biases)
    [note] = notes_of(tmp_path / "hf", tmp_path / "out")
    assert note.startswith("9 tensors left out: biases of zeros")


def test_biases_of_zeros_beside_an_opt_without(tmp_path: Path) -> None:
    make_opt(tmp_path / "hf", enable_bias=False)
    edit_tensors(tmp_path / "hf", **{"model.decoder.layers.0.fc1.bias": torch.zeros(44)})
    [note] = notes_of(tmp_path / "hf", tmp_path / "out")
    assert "fc1.bias" in note
    edit_tensors(tmp_path / "hf", **{"model.decoder.layers.0.fc1.bias": torch.eye(44)[-1]})
    refuse_source(tmp_path, "model.decoder.layers.0.fc1.bias", source="hf")


@pytest.mark.parametrize("value", [1e-30, float("nan")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.bias", "lm_head.bias"])
def test_a_bias_that_is_not_zero_is_refused(name: str, value: float, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", random_tensors() | {name: torch.tensor([0.0] * 7 + [value])})
    refuse_source(tmp_path, name, "not part of a model")


# --- an output head that config.json ties to the embedding


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_another_head_than_the_tied_one_is_kept(family: str, form: str, tmp_path: Path) -> None:
    make = make_model if family == "llama" else make_opt
    make(tmp_path / "hf", tied=False, form=form)
    edit_json(tmp_path / "hf" / "config.json", lambda fields: fields.update(tie_word_embeddings=True))
    [note] = notes_of(tmp_path / "hf", tmp_path / "out")
    assert "tie_word_embeddings" in note
    assert "lm_head.weight" in note
    assert open_source(tmp_path / "out").config.tie_word_embeddings is False


def test_a_head_that_differs_in_its_last_value_is_another(tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", tied=True)
    head = model.lm_head.weight.detach().clone()
    head[-1, -1] += 1e-6
    edit_tensors(tmp_path / "hf", **{HEAD: head})
    assert len(notes_of(tmp_path / "hf", tmp_path / "out")) == 1
    assert torch.equal(load(tmp_path / "out").lm_head.weight, head)


def test_the_embedding_again_as_the_head(tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", tied=True)
    edit_tensors(tmp_path / "hf", **{HEAD: model.lm_head.weight.detach().clone()})
    assert notes_of(tmp_path / "hf", tmp_path / "out") == []
    assert open_source(tmp_path / "out").config.tie_word_embeddings is True


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_only_the_tied_head_is_stored(family: str, tmp_path: Path) -> None:
    make, embedding = (make_model, EMBEDDING) if family == "llama" else (make_opt, OPT_EMBEDDING)
    model = make(tmp_path / "hf", tied=True)
    weight = model.lm_head.weight.detach().clone()
    edit_tensors(tmp_path / "hf", **{embedding: None, HEAD: weight})
    [note] = notes_of(tmp_path / "hf", tmp_path / "out")
    assert f"lm_head.weight is stored without {embedding}" in note
    assert torch.equal(load(tmp_path / "out").get_input_embeddings().weight, weight)


def test_a_tied_head_of_another_shape(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", random_tensors() | {HEAD: torch.ones(50, 8)}, tie_word_embeddings=True)
    refuse_source(tmp_path, HEAD, "[50, 8]")


def test_an_untied_model_without_embedding(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors[EMBEDDING]
    write_hf(tmp_path / "hf", tensors)
    refuse_source(tmp_path, "lacks the tensor model.embed_tokens.weight")


# --- fields of config.json

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"
PARAMETERS = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
# Fields that make_model's config.json gets (None: null), and words of the note about them; no words, no note.
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": None}, ""),
    ({"rope_scaling": {}}, ""),
    ({"rope_scaling": {"type": "default"}, "rope_parameters": None}, ""),
    ({"rope_scaling": {"type": "default"}, "rope_parameters": PARAMETERS}, "rope_scaling counts"),
    ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_scaling counts"),
    ({"rope_scaling": LINEAR, "rope_parameters": PARAMETERS, "rope_theta": 7000.0}, "rope_scaling counts"),
    ({"rope_scaling": LINEAR | {"rope_theta": 3e4}, "rope_parameters": None, "rope_theta": 7000.0}, "30000.0 counts"),
    ({"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 7e3}, "rope_theta": 7e3}, ""),
    ({"rope_scaling": None, "rope_parameters": PARAMETERS, "rope_theta": 7000.0}, "500000.0 counts"),
    ({"rope_parameters": PARAMETERS, "rope_theta": 500000.0}, ""),
    ({"rope_parameters": LINEAR, "rope_theta": 7000.0}, ""),
    ({"rope_scaling": LINEAR | {"type": "linear"}, "rope_parameters": None}, ""),
    ({"rope_scaling": LINEAR | {"type": "default"}, "rope_parameters": None}, "the first counts"),
    ({"rope_scaling": {"rope_type": "default", "type": "linear"}, "rope_parameters": None}, "the first counts"),
    ({"rope_scaling": {"type": "linear", "factor": 2, "finetuned": True}, "rope_parameters": None}, ""),
    ({"rope_parameters": LLAMA3}, "max_position_embeddings, 512, takes its place"),
    ({"rope_parameters": LLAMA3, "max_position_embeddings": 64}, "max_position_embeddings, 64, takes its place"),
    ({"rope_parameters": LLAMA3, ORIGINAL: 32}, ""),
    ({"rope_parameters": LLAMA3 | {ORIGINAL: 32}}, ""),
    ({"rope_parameters": LLAMA3 | {ORIGINAL: 32}, ORIGINAL: 64}, "64 counts"),
    ({"rope_parameters": LLAMA3 | {ORIGINAL: 32}, ORIGINAL: 32}, ""),
    ({"rope_theta": 10000, "rope_parameters": None}, ""),
    ({"num_key_value_heads": None}, ""),
    ({"head_dim": None}, ""),
    ({"bos_token_id": None, "eos_token_id": None}, ""),
    ({"bos_token_id": -1}, "bos_token_id in config.json is -1"),
    ({"eos_token_id": -1}, "eos_token_id in config.json is -1"),
    ({"eos_token_id": [7, 2]}, ""),
    ({"eos_token_id": 4294967295}, "eos_token_id in config.json is 4294967295"),
    ({"eos_token_id": [-1, 2]}, "eos_token_id in config.json is -1"),
    ({"eos_token_id": []}, ""),
    ({"dtype": "float64"}, "float64"),
    ({"dtype": None, "torch_dtype": "float16"}, ""),
]


@pytest.mark.parametrize(("fields", "says"), FIELDS, ids=str)
def test_fields_are_read_as_by_transformers(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    make_model(tmp_path / "hf", seed=3)
    edit_json(tmp_path / "hf" / "config.json", lambda content: content.update(fields))
    notes = notes_of(tmp_path / "hf", tmp_path / "out")
    assert [says in note for note in notes] == ([True] if says else []), notes
    theirs, model = AutoConfig.from_pretrained(tmp_path / "hf"), load(tmp_path / "hf")
    ours = open_source(tmp_path / "out").config
    frequencies = torch.tensor(inverse_frequencies(ours), dtype=torch.float32)
    torch.testing.assert_close(frequencies, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert ours.max_position_embeddings == theirs.max_position_embeddings


# Fields that a config.json lacks, of each model type.
ABSENT = [
    *("max_position_embeddings", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "rms_norm_eps"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "dtype", "rope_parameters", "hidden_act"),
]


@pytest.mark.parametrize("kind", ["llama", "mistral", "opt"])
def test_absent_fields_are_completed_as_by_transformers(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 50}
    fields = {"model_type": kind, **sizes, "ffn_dim" if kind == "opt" else "intermediate_size": 24}
    theirs = AutoConfig.for_model(**fields)
    ours = from_hf(fields | ({"sliding_window": None} if kind == "mistral" else {}))
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    if kind != "opt":
        assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
        assert (ours.norm_eps, ours.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])


@pytest.mark.parametrize("field", ABSENT)
def test_a_field_that_is_absent(field: str, tmp_path: Path) -> None:
    make_model(tmp_path / "hf", seed=3)
    edit_json(tmp_path / "hf" / "config.json", lambda content: content.pop(field))
    assert notes_of(tmp_path / "hf", tmp_path / "out") == []


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["auto", "bf16", "int8", "", 7, ["float16"], {"": "float16"}], ids=str)
def test_a_dtype_that_is_none(field: str, value: Any, tmp_path: Path) -> None:
    """transformers refuses such a config.json, or takes "auto" of older versions for the tensors' own."""
    make_model(tmp_path / "hf", dtype="float16")
    edit_json(tmp_path / "hf" / "config.json", lambda content: content.pop("dtype"))
    edit_json(tmp_path / "hf" / "config.json", lambda content: content.update({field: value}))
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out").stderr
    assert "Note: config.json has the dtype" in said
    assert open_source(tmp_path / "out").config.dtype == "float16"


def test_a_list_of_first_tokens(tmp_path: Path) -> None:
    """transformers refuses it."""
    write_hf(tmp_path / "hf", bos_token_id=[5, 7])
    assert "5 is taken" in invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out").stderr
    assert open_source(tmp_path / "out").config.bos_token_id == 5


def test_notes_don_t_stand_beside_an_error(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", random_tensors() | {"model.rotary_emb.inv_freq": torch.ones(2), "x": torch.ones(2)})
    refuse_source(tmp_path, "the tensor x")


def test_the_source_stays_as_it_was(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", tied=False)
    edit_json(tmp_path / "hf" / "config.json", lambda fields: fields.update(tie_word_embeddings=True))
    before = snapshot(tmp_path / "hf")
    notes_of(tmp_path / "hf", tmp_path / "out")
    assert snapshot(tmp_path / "hf") == before
