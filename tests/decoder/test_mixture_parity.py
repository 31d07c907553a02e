"""The decoder with weights in several formats against transformers holding what they stand for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import virtual_chips
from invoke import invoke
from mixtures import FORMATS, SIZES, reference, shard
from models import make_model, make_opt
from parity import count_greedy, decode, logits_after, relative
from transformers import PreTrainedModel

from quantize.shards.reading import Shards
from runtime.cli import command as run
from runtime.devices import xla
from runtime.model.decoder_tensors import decoder_parameters
from runtime.model.kv_cache import FunctionalKVCache
from runtime.run.generate import Generator
from runtime.run.load import load_decoder, make_cache
from runtime.run.session import open_session

NEW_TOKENS = 16
PROMPTS = [[7], [3, 5, 7, 9, 11, 200, 110, 44, 23], list(range(20, 40))]  # none in a bucket of 16, one, two sections


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    make_model(root / "hf", **SIZES)
    for chips in (1, 2, 3, 4):
        shard(root / "hf", root / f"out{chips}", chips)
    return root


@pytest.fixture(scope="module")
def theirs(root: Path) -> PreTrainedModel:
    return reference(root / "hf", root / "out1")


def assert_parity(theirs: PreTrainedModel, shards: Path, **options: Any) -> None:
    """Logits within 1e-4, the greedy tokens, nothing compiled after warm-up."""
    sizes = {"dtype": "float32", "new_tokens": NEW_TOKENS, "max_seq_len": 40, "buckets": [16]}
    [result] = decode([{"shards": shards, "batches": [[prompt] for prompt in PROMPTS], **sizes, **options}])
    assert result["recompilations"] == 0
    compared = 0
    for prompt, logits, ids in zip(PROMPTS, result["logits"], result["token_ids"], strict=True):
        assert relative(logits[0], logits_after(theirs, prompt)[-1]) < 1e-4
        compared += count_greedy(theirs, prompt, ids[0])
    assert compared >= len(PROMPTS) * NEW_TOKENS // 2


@pytest.mark.parametrize("chips", [1, 2, 3, 4])
def test_xla_equals_transformers(theirs: PreTrainedModel, root: Path, chips: int) -> None:
    assert_parity(theirs, root / f"out{chips}", backend="xla")


@pytest.mark.parametrize("chips", [1, 3])
def test_eager_equals_transformers(theirs: PreTrainedModel, root: Path, chips: int) -> None:
    assert_parity(theirs, root / f"out{chips}", backend="eager")


@pytest.mark.parametrize(("backend", "chips"), [("eager", 1), ("xla", 3)])
def test_biases_go_with_their_weights(backend: str, chips: int, tmp_path: Path) -> None:
    """OPT, in whose first layer q, k and v are apart, and in whose second they are one product."""
    make_opt(tmp_path / "hf", heads=4, hidden=64, ffn=160, vocab=211, positions=64)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
    first = ("int8", "unquantized", "int4-g32-zp", "fp8", "int8", "int4-g32")
    second = ("int4-g64", "int4-g64", "int4-g64", "unquantized", "unquantized", "int8")
    formats = {
        f"model.decoder.layers.{layer}.{name}.weight": form
        for layer, forms in enumerate((first, second))
        for name, form in zip(names, forms, strict=True)
    }
    for count in {1, chips}:
        shard(tmp_path / "hf", tmp_path / f"out{count}", count, formats)
    assert_parity(reference(tmp_path / "hf", tmp_path / "out1"), tmp_path / f"out{chips}", backend=backend)


@pytest.mark.slow
def test_inductor_equals_transformers(theirs: PreTrainedModel, root: Path) -> None:
    assert_parity(theirs, root / "out1", backend="inductor")


@pytest.mark.parametrize("chips", [1, 3])
def test_forms_for_matrix_units(theirs: PreTrainedModel, root: Path, chips: int) -> None:
    """Weights as TPUs take them, on virtual chips."""
    virtual_chips.start()
    shards, backend = Shards(root / f"out{chips}"), xla.XLABackend(chips)
    backend.tiled, backend.cache_type, backend.fuse_bytes = False, FunctionalKVCache, xla.TPU_FUSE_BYTES
    backend.form = xla._chip_form(xla.TPU_LEAST_ROWS, chips)
    with torch.no_grad(), virtual_chips.quickly_compiled():
        decoder, _ = load_decoder(shards, shards.config, torch.float32, backend, lambda *done: None)
        cache = make_cache(shards.config, backend, 1, 40, torch.float32)
        logits = Generator(shards.config, decoder, cache, backend, [16]).logits([PROMPTS[1]]).float()
    assert relative(logits[0], logits_after(theirs, PROMPTS[1])[-1]) < 1e-4


def test_activations_in_int8(theirs: PreTrainedModel, root: Path) -> None:
    """Rounded where the weights allow it, with a note on the others."""
    options = ("--backend", "eager", "--activations", "int8", "--prompt-ids", "3,4", "--max-new-tokens", 1)
    said = invoke(run, "--shards", root / "out1", *options, "--max-seq-len", 16).stderr
    assert "not rounded to int8 before weights in int4 in groups of 64, " in said
    with open_session(root / "out1", backend="eager", dtype=torch.float32, activations="int8") as session:
        logits = session.logits([PROMPTS[1]])
    assert 1e-3 < relative(logits[0], logits_after(theirs, PROMPTS[1])[-1]) < 0.1


def test_what_a_format_changes_would_be_seen(theirs: PreTrainedModel, root: Path, tmp_path: Path) -> None:
    """Of any one weight's."""
    last = logits_after(theirs, PROMPTS[1])[-1]
    for name, form in (("model.layers.2.mlp.down_proj.weight", "int8"), ("model.layers.0.mlp.up_proj.weight", "int4")):
        other = shard(root / "hf", tmp_path / form, 1, FORMATS | {name: form})
        assert relative(logits_after(reference(root / "hf", other), PROMPTS[1])[-1], last) > 2e-4


def test_layers_cut_off(theirs: PreTrainedModel, root: Path) -> None:
    """The first layer alone, by shards that say what others are in too."""
    first = copy.deepcopy(theirs)
    first.model.layers = first.model.layers[:1]
    options = {"backend": "eager", "dtype": torch.float32, "max_seq_len": 16, "layers": 1}
    with open_session(root / "out3", **options) as session:
        logits = session.logits([PROMPTS[1]])
    assert relative(logits[0], logits_after(first, PROMPTS[1])[-1]) < 1e-4
    assert relative(logits[0], logits_after(theirs, PROMPTS[1])[-1]) > 1e-2


@pytest.mark.parametrize("chips", [1, 3])
def test_linears_of_one_format_are_fused(root: Path, chips: int) -> None:
    shards = Shards(root / f"out{chips}")
    held = [each.name for each in decoder_parameters(shards.config, shards.manifest.scheme, chips, None)]
    fused = {name.removeprefix("model.layers.") for name in held if "qkv" in name or "gate_up" in name}
    assert fused == {"1.self_attn.qkv_proj.weight", "2.mlp.gate_up_proj.weight"}
    apart = {"0.self_attn.q_proj.weight", "0.mlp.up_proj.weight", "1.mlp.gate_proj.weight", "2.self_attn.v_proj.weight"}
    assert apart < {name.removeprefix("model.layers.") for name in held}
