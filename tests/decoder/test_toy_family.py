"""A family that is registered here alone: from its files to logits, against transformers' LLaMA with 1 + w as norms."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from invoke import invoke, invoke_error
from models import make_model, stored
from parity import logits_after, relative
from safetensors.torch import save_file
from toy_family import TOY, OnePlusNorm, ToyNorm, renamed
from transformers import LlamaForCausalLM

from converters.cli import command as convert
from converters.model.families import registry
from converters.sources.opening import open_source
from quantize.cli import command as quantize
from quantize.shards.reading import Shards
from runtime.devices.host import HostBackend
from runtime.model.parts.norms import NORM_KINDS
from runtime.run.load import load_decoder, make_cache

SIZES = {"heads": 7, "kv_heads": 7, "hidden": 70, "ffn": 173, "vocab": 517}  # none of which 3 chips divide
FIELDS = {
    "model_type": "toy",
    "hidden_size": 70,
    "inner_size": 173,
    "num_hidden_layers": 2,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
    "vocab_size": 517,
    "max_position_embeddings": 512,
}
PROMPT = torch.randint(3, 517, (41,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, TOY))
    monkeypatch.setitem(NORM_KINDS, ToyNorm.ONE_PLUS, OnePlusNorm)


def toy_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """LLaMA's weights as the toy family stores them."""
    return {renamed(name): stored_norm(tensor, -1) for name, tensor in model.state_dict().items()}


def stored_norm(tensor: torch.Tensor, change: float) -> torch.Tensor:
    """A norm's weight changed by so much; any other tensor as it is."""
    return tensor + change if tensor.dim() == 1 else tensor.clone()


def dequantized(model: LlamaForCausalLM, shards: Shards) -> LlamaForCausalLM:
    """LLaMA with everything that the toy's shards stand for."""
    for name, tensor in model.state_dict().items():
        values = shards.rows(renamed(name), 0, len(tensor)).float()
        scale = renamed(name) + "_scale"
        scaled = values * shards.rows(scale, 0, len(tensor)) if scale in shards.tensors else values
        tensor.copy_(stored_norm(scaled, 1))
    return model


@torch.no_grad()
def logits_of(shards: Shards) -> torch.Tensor:
    """[V], after PROMPT, by our decoder in float32."""
    backend = HostBackend("eager")
    decoder, _ = load_decoder(shards, shards.config, torch.float32, backend, lambda *done: None)
    cache = make_cache(shards.config, backend, 1, 64, torch.float32)
    return decoder(torch.tensor([PROMPT]), torch.arange(len(PROMPT)), torch.tensor([0]), cache)[0]


def test_from_its_files_to_logits(tmp_path: Path) -> None:
    model = make_model(tmp_path / "llama", **SIZES)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text(json.dumps(FIELDS))
    save_file(toy_tensors(model), tmp_path / "toy" / "model.safetensors", {"format": "pt"})
    invoke(convert, "--source", tmp_path / "toy", "--out", tmp_path / "checkpoint", "--dtype", "float32")
    written = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert FIELDS.items() <= written.items()
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--chips", 3, "--out", tmp_path / "shards")
    shards = Shards(tmp_path / "shards")
    assert shards.chips == 3
    assert any(name.endswith("_scale") for name in shards.tensors)
    ours = logits_of(shards)
    before = logits_after(model, PROMPT)[-1]
    assert relative(ours, logits_after(dequantized(model, shards), PROMPT)[-1]) < 1e-4
    assert relative(ours, before) > 1e-3  # what int8 changes would be seen


def test_its_gguf_file_holds_the_same(tmp_path: Path) -> None:
    model = make_model(tmp_path / "llama", **SIZES)
    expected = toy_tensors(model)
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "toy")
    writer.add_embedding_length(70)
    writer.add_feed_forward_length(173)
    writer.add_block_count(2)
    writer.add_head_count(7)
    writer.add_context_length(512)
    writer.add_float32("toy.norm_epsilon", 1e-5)
    blocks = {
        f"blk.{layer}.{name}.weight": f"toy.layers.{layer}.{hf}.weight"
        for layer in range(2)
        for name, hf in TOY.gguf.block_names.items()
    }
    for name, hf in (TOY.gguf.model_names | blocks).items():
        writer.add_tensor(name, np.ascontiguousarray(expected[hf].numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "toy.gguf")
    assert source.config.architecture == TOY.architecture
    for name, tensor in expected.items():
        assert torch.equal(source.rows(name, 0, len(tensor)), tensor), name


def test_random_norms_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(FIELDS))
    invoke(convert, "--config", tmp_path / "toy.json", "--storage", "files", "--out", tmp_path / "out")
    norms = {name: t for name, t in stored(tmp_path / "out").items() if t.dim() == 1}
    assert len(norms) == 5
    assert not any(tensor.any() for tensor in norms.values())


def test_what_it_lacks_is_said_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text(json.dumps({name: FIELDS[name] for name in FIELDS if name != "inner_size"}))
    assert "lacks inner_size; it is no Toy configuration" in invoke_error(convert, "--config", tmp_path / "toy.json")
    (tmp_path / "toy.json").write_text(json.dumps(FIELDS | {"model_type": "other"}))
    assert "'llama', 'mistral', 'opt', 'toy'" in invoke_error(convert, "--config", tmp_path / "toy.json")
