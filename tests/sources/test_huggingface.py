"""llama-convert from Hugging Face directories: what comes out, read by transformers, is what went in."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke
from models import assert_same_bits, make_model, random_tensors, snapshot, stored, write_hf
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from converters.cli import command as convert
from converters.model.parameters import parameters
from converters.sources.opening import open_source

VARIETIES: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query": {"heads": 6, "kv_heads": 2, "seed": 2},
    "one-kv-head": {"kv_heads": 1},
    "tied": {"tied": True},
    "indexed": {"max_shard_size": "20KB"},
    "tied-indexed": {"tied": True, "max_shard_size": "20KB"},
    "divisible-by-nothing": {"heads": 3, "hidden": 36, "ffn": 172, "vocab": 515},
    "head-dim": {"head_dim": 20, "kv_heads": 2},
    "rope-theta": {"theta": 500000.0, "eps": 1e-6},
    "several-ends": {"eos": [2, 7]},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "bin": {"form": "bin"},
    "bin-indexed": {"form": "bin", "max_shard_size": "20KB"},
    "bin-tied-bfloat16": {"form": "bin", "tied": True, "dtype": "bfloat16"},
}
FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings"),
    *("hidden_act", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "model_type"),
)


def load(directory: Path, dtype: torch.dtype | str = "auto") -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def generate(model: LlamaForCausalLM) -> list[int]:
    prompt = torch.tensor([[1, 5, 9, 3]])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    return made[0, 4:].tolist()


@pytest.mark.parametrize("variety", VARIETIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_the_same_model(variety: str, dtype: str, tmp_path: Path) -> None:
    """The directory as it is, every weight, the configuration, greedy tokens; and the source stays as it was."""
    model = make_model(tmp_path / "hf", **VARIETIES[variety])
    before = snapshot(tmp_path / "hf")
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", "--dtype", dtype)
    assert snapshot(tmp_path / "hf") == before
    converted = load(tmp_path / "out")
    assert converted.dtype == getattr(torch, dtype)
    assert_same_bits(converted.state_dict(), {k: t.to(converted.dtype) for k, t in model.state_dict().items()})
    for field in FIELDS:
        assert getattr(converted.config, field) == getattr(model.config, field), field
    expected = generate(load(tmp_path / "hf", dtype))
    assert len(set(expected)) > 3  # a model that repeats itself would prove little
    assert generate(converted) == expected


def test_float32_to_float16(tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf")
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", "--dtype", "float16")
    assert_same_bits(load(tmp_path / "out").state_dict(), model.to(torch.float16).state_dict())


def test_bin_of_parameters(tmp_path: Path) -> None:
    """Some people save named_parameters instead of the state dict: tensors that require gradients."""
    model = make_model(tmp_path / "hf", form="bin")
    torch.save(dict(model.named_parameters()), tmp_path / "hf" / "pytorch_model.bin")
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", "--dtype", "float32")
    assert_same_bits(load(tmp_path / "out").state_dict(), model.state_dict())


def test_mixed_dtypes_are_read_as_the_widest(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    write_hf(tmp_path / "hf", tensors)
    assert open_source(tmp_path / "hf").config.dtype == "float32"
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", "--dtype", "float32")
    assert_same_bits(stored(tmp_path / "out"), {name: tensor.float() for name, tensor in tensors.items()})


def test_fields_of_older_configurations(tmp_path: Path) -> None:
    """rope_theta by itself, as transformers 4 writes it; no head_dim, no number of KV heads, no token ids."""
    write_hf(tmp_path / "hf", rope_theta=12345.0)
    path = tmp_path / "hf" / "config.json"
    fields = json.loads(path.read_text())
    for name in ("head_dim", "bos_token_id", "eos_token_id", "rms_norm_eps"):
        del fields[name]
    path.write_text(json.dumps(fields))
    config = open_source(tmp_path / "hf").config
    assert (config.rope_theta, config.head_dim, config.bos_token_id, config.eos_token_ids) == (12345.0, 4, 1, (2,))
    assert config.norm_eps == 1e-6  # transformers' own default for LLaMA


def test_auxiliary_files_go_along(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json"):
        (tmp_path / "hf" / name).write_bytes(name.encode())
    (tmp_path / "hf" / "README.md").write_text("not part of the model")
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == name.encode()
    assert not (tmp_path / "out" / "README.md").exists()


def test_layers_keeps_the_first_ones(tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", layers=3)
    arguments = ("--source", tmp_path / "hf", "--out", tmp_path / "out", "--dtype", "float32", "--layers", 2)
    invoke(convert, *arguments)
    converted = load(tmp_path / "out")
    assert converted.config.num_hidden_layers == 2
    kept = {name: t for name, t in model.state_dict().items() if not name.startswith("model.layers.2.")}
    assert_same_bits(converted.state_dict(), kept)


@pytest.mark.parametrize("size", ["1KB", "20KB", "1KiB"])
def test_max_shard_size(size: str, tmp_path: Path) -> None:
    """Several files, none over the size but for a single larger tensor, and an index that is true."""
    limit = {"1KB": 1000, "20KB": 20000, "1KiB": 1024}[size]
    model = make_model(tmp_path / "hf")
    out = tmp_path / "out"
    invoke(convert, "--source", tmp_path / "hf", "--out", out, "--dtype", "float32", "--max-shard-size", size)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    sizes = []
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            values = [file.get_tensor(name).nbytes for name in names]
        assert len(names) == 1 or sum(values) <= limit
        held |= dict.fromkeys(names, path.name)
        sizes.append(sum(values))
    assert index["weight_map"] == held
    assert held.keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(sizes) == sum(t.nbytes for t in model.state_dict().values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in model.state_dict().values())
    assert len(sizes) > 2
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        f"model-{number:05d}-of-{len(sizes):05d}.safetensors" for number in range(1, len(sizes) + 1)
    ]
    assert all(a + b > limit for a, b in pairwise(sizes) if max(a, b) < limit / 2)  # none could have been joined
    assert_same_bits(load(out).state_dict(), model.state_dict())


def test_values_of_a_file_begin_aligned(tmp_path: Path) -> None:
    """The header is padded to 64 bytes, so that mapped values can be used where they are."""
    write_hf(tmp_path / "hf")
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", "--max-shard-size", "1KB")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 64 == 0


def test_the_same_command_again(tmp_path: Path) -> None:
    make_model(tmp_path / "hf")
    arguments = ("--source", tmp_path / "hf", "--out", tmp_path / "out")
    assert "parameters, float32, 1 file" in invoke(convert, *arguments).stdout
    before = snapshot(tmp_path / "out")
    written = (tmp_path / "out" / "model-00001-of-00001.safetensors").stat().st_mtime_ns
    assert "already complete" in invoke(convert, *arguments).stdout
    assert snapshot(tmp_path / "out") == before
    assert (tmp_path / "out" / "model-00001-of-00001.safetensors").stat().st_mtime_ns == written


def test_force_makes_it_anew(tmp_path: Path) -> None:
    make_model(tmp_path / "hf")
    arguments = ("--source", tmp_path / "hf", "--out", tmp_path / "out")
    invoke(convert, *arguments)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path / "out")
    written = (tmp_path / "out" / "model-00001-of-00001.safetensors").stat().st_mtime_ns
    assert "already complete" not in invoke(convert, *arguments, "--force").stdout
    assert snapshot(tmp_path / "out") == before
    assert (tmp_path / "out" / "model-00001-of-00001.safetensors").stat().st_mtime_ns > written


def test_a_lost_file_is_written_again(tmp_path: Path) -> None:
    """An index is there, so the directory was finished once; that alone doesn't make it complete."""
    write_hf(tmp_path / "hf")
    arguments = ("--source", tmp_path / "hf", "--out", tmp_path / "out", "--max-shard-size", "2KB")
    invoke(convert, *arguments)
    before = snapshot(tmp_path / "out")
    (tmp_path / "out" / sorted(name for name in before if name.startswith("model-"))[1]).unlink()
    assert "already complete" not in invoke(convert, *arguments).stdout
    assert snapshot(tmp_path / "out") == before


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    shown = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", "--dry-run").stdout
    assert "model-00001-of-00001.safetensors" in shown
    assert not (tmp_path / "out").exists()


def test_a_converted_directory_is_a_source(tmp_path: Path) -> None:
    """Another dtype can be made of it, and converting to the same one changes no tensor."""
    model = make_model(tmp_path / "hf", kv_heads=2)
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "once", "--dtype", "float32")
    invoke(convert, "--source", tmp_path / "once", "--out", tmp_path / "twice", "--dtype", "float32")
    assert_same_bits(stored(tmp_path / "twice"), model.state_dict())


def test_rows_of_a_source_are_slices_of_the_whole(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", files=3)
    source = open_source(tmp_path / "hf")
    expected = random_tensors()
    for parameter in parameters(source.config):
        whole = source.rows(parameter.name, 0, parameter.shape[0])
        assert_same_bits({"": whole}, {"": expected[parameter.name]})
        middle = parameter.shape[0] // 2
        assert_same_bits({"": source.rows(parameter.name, 1, middle)}, {"": whole[1:middle]})


def test_fingerprint_follows_weights_and_configuration(tmp_path: Path) -> None:
    tensors = random_tensors()
    first = open_source(write_hf(tmp_path / "a", tensors)).fingerprint()
    assert open_source(write_hf(tmp_path / "b", tensors)).fingerprint() == first
    assert open_source(write_hf(tmp_path / "c", tensors, rope_theta=math.e)).fingerprint() != first
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    assert open_source(write_hf(tmp_path / "d", tensors)).fingerprint() != first
