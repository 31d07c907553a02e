"""Shards turned into Hugging Face directories again: dequantized, or int8 in the compressed-tensors layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke, refuse
from models import edit_json, make_model, make_opt, snapshot, stored, write_hf
from parity import decode, logits_after, relative
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from converters.cli import command as convert
from converters.sources.opening import open_source
from quantize.cli import command as quantize

# Sizes divisible by nothing: heads of zeros and repeated KV heads on 3 and 8 chips, padded vocabularies.
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"heads": 6, "kv_heads": 2, "head_dim": 16, "ffn": 172, "vocab": 515},
    "tied": {"heads": 5, "hidden": 40, "ffn": 97, "vocab": 131, "tied": True},
    "opt": {"heads": 5, "hidden": 40, "ffn": 97, "vocab": 131},
    "opt-projected": {"heads": 5, "hidden": 40, "ffn": 97, "vocab": 131, "width": 28, "do_layer_norm_before": False},
    "opt-untied": {"heads": 5, "hidden": 40, "ffn": 97, "vocab": 131, "tied": False},
}


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def dequantized_by_hand(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale")}
    for name in [name for name, tensor in weights.items() if tensor.dtype == torch.int8]:
        scale = tensors[f"{name}_scale"]
        rows = [values.float() * factor for values, factor in zip(weights[name], scale[:, 0], strict=True)]
        weights[name] = torch.stack(rows)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def shards_of(root: Path, model: str, chips: int, *options: object, dtype: str = "bfloat16") -> Path:
    """int8 shards of a random model in ``root``/out, and for one chip, which splits nothing, in ``root``/one."""
    make = make_opt if model.startswith("opt") else make_model
    make(root / "hf", **MODELS[model])
    invoke(convert, "--source", root / "hf", "--out", root / "checkpoint", "--dtype", dtype)
    for number, out in ((chips, "out"), (1, "one")):
        invoke(quantize, root / "checkpoint", "--int8", "--chips", number, *options, "--out", root / out)
    return root / "out"


@pytest.mark.parametrize("chips", [1, 3, 8])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantized(model: str, chips: int, dtype: str, tmp_path: Path) -> None:
    """Bit-equal to dequantizing by hand what one chip holds: chips put together, padding and copies dropped."""
    out = shards_of(tmp_path, model, chips)
    before = snapshot(out)
    invoke(convert, "--source", out, "--out", tmp_path / "restored", "--dtype", dtype)
    expected = dequantized_by_hand(stored(tmp_path / "one"), getattr(torch, dtype))
    assert_same_bits(stored(tmp_path / "restored"), expected)
    assert snapshot(out) == before
    written, original = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("restored", "hf"))
    assert "quantization_config" not in written
    for field in ("hidden_size", "num_key_value_heads", "ffn_dim", "tie_word_embeddings", "vocab_size"):
        assert written.get(field) == original.get(field)
    model_again = AutoModelForCausalLM.from_pretrained(tmp_path / "restored", dtype="auto")
    assert_same_bits({name: model_again.state_dict()[name] for name in expected}, expected)


@pytest.mark.parametrize("chips", [1, 3])
def test_bfloat16_shards_give_the_checkpoint_back(chips: int, tmp_path: Path) -> None:
    make_model(tmp_path / "hf", **MODELS["grouped"], dtype="bfloat16")
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer.json").write_text("{}")
    invoke(quantize, tmp_path / "checkpoint", "--bf16", "--chips", chips, "--out", tmp_path / "out")
    invoke(convert, "--source", tmp_path / "out", "--out", tmp_path / "restored")
    assert_same_bits(stored(tmp_path / "restored"), stored(tmp_path / "checkpoint"))
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "restored" / name).read_bytes() == (tmp_path / "checkpoint" / name).read_bytes()


@pytest.mark.parametrize("chips", [1, 3, 8])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("grouped", []),
        ("grouped", ["--quantize-lm-head"]),
        ("tied", []),
        ("opt", []),
        ("opt-projected", []),
        ("opt-untied", ["--quantize-lm-head"]),
    ],
)
def test_int8_is_kept(model: str, options: list[str], chips: int, tmp_path: Path) -> None:
    """Values and scales as one chip holds them, under the names and in the terms of compressed-tensors."""
    from compressed_tensors.quantization import QuantizationConfig

    out = shards_of(tmp_path, model, chips, *options)
    said = invoke(convert, "--source", out, "--out", tmp_path / "restored", "--keep-int8").stdout
    assert "int8 and bfloat16" in said
    assert_same_bits(stored(tmp_path / "restored"), stored(tmp_path / "one"))
    written = json.loads((tmp_path / "restored" / "config.json").read_text())["quantization_config"]
    described = QuantizationConfig.model_validate(written)
    assert described.format == "int-quantized"
    projections = ["model.decoder.project_in", "model.decoder.project_out"] if model == "opt-projected" else []
    assert described.ignore == ([] if options else ["lm_head"]) + projections
    (group,) = described.config_groups.values()
    assert (group.targets, group.format, group.input_activations) == (["Linear"], "int-quantized", None)
    weights = group.weights
    assert (weights.num_bits, weights.type, weights.strategy, weights.symmetric) == (8, "int", "channel", True)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("grouped", ["--quantize-lm-head"]),
        ("grouped", []),
        ("tied", []),
        ("opt", []),
        ("opt-projected", []),
        ("opt-untied", ["--quantize-lm-head"]),
    ],
)
def test_transformers_runs_the_int8_export_as_llama_run_does(model: str, options: list[str], tmp_path: Path) -> None:
    out = shards_of(tmp_path, model, 3, *options, dtype="float32")
    invoke(convert, "--source", out, "--out", tmp_path / "restored", "--keep-int8", "--dtype", "float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "restored", dtype=torch.float32).eval()
    linear = theirs.model.decoder.layers[1].fc2 if model.startswith("opt") else theirs.model.layers[1].mlp.down_proj
    assert (linear.weight.dtype, linear.weight_scale.shape) == (torch.int8, (linear.weight.shape[0], 1))
    prompts = [[1, 5, 9, 3], list(range(20, 70))]
    sizes = {"batches": [[prompt] for prompt in prompts], "new_tokens": 1, "max_seq_len": 64, "buckets": [32]}
    [result] = decode([{"shards": out, "dtype": "float32", "backend": "eager", **sizes}])
    for prompt, logits in zip(prompts, result["logits"], strict=True):
        assert relative(logits[0], logits_after(theirs, prompt)[-1]) < 1e-3


def test_layers_are_cut_and_files_split(tmp_path: Path) -> None:
    out = shards_of(tmp_path, "grouped", 3)
    arguments = ("--source", out, "--layers", 1, "--max-shard-size", "20KB", "--keep-int8")
    invoke(convert, *arguments, "--out", tmp_path / "restored")
    assert len(list((tmp_path / "restored").glob("*.safetensors"))) > 2
    whole = stored(tmp_path / "one")
    kept = {name: tensor for name, tensor in whole.items() if not name.startswith("model.layers.1.")}
    assert_same_bits(stored(tmp_path / "restored"), kept)


@pytest.mark.parametrize("flags", [[], ["--keep-int8"]], ids=str)
def test_the_same_command_again_and_another_one(flags: list[str], tmp_path: Path) -> None:
    out = shards_of(tmp_path, "grouped", 3)
    arguments = ("--source", out, "--out", tmp_path / "restored", *flags)
    assert not list(tmp_path.glob("restored"))
    assert "GB free" in invoke(convert, *arguments, "--dry-run").stdout
    assert not list(tmp_path.glob("restored"))
    invoke(convert, *arguments)
    before = snapshot(tmp_path / "restored")
    assert "already complete" in invoke(convert, *arguments).stdout
    other = [] if flags else ["--keep-int8"]
    changed = ("--source", out, "--out", tmp_path / "restored", *other)
    refuse(tmp_path, convert, *changed, says=["keep_int8", "--force"])
    invoke(convert, *changed, "--force")
    assert snapshot(tmp_path / "restored") != before
    invoke(convert, *arguments, "--force")
    assert snapshot(tmp_path / "restored") == before


def test_the_export_is_a_source(tmp_path: Path) -> None:
    """Its dequantized weights, and again its int8 values; and quantizing it anew gives values that stand for them."""
    out = shards_of(tmp_path, "grouped", 3, "--quantize-lm-head")
    invoke(convert, "--source", out, "--out", tmp_path / "export", "--keep-int8")
    invoke(convert, "--source", out, "--out", tmp_path / "restored")
    invoke(convert, "--source", tmp_path / "export", "--out", tmp_path / "from-export")
    assert_same_bits(stored(tmp_path / "from-export"), stored(tmp_path / "restored"))
    invoke(convert, "--source", tmp_path / "export", "--out", tmp_path / "again", "--keep-int8")
    assert_same_bits(stored(tmp_path / "again"), stored(tmp_path / "export"))
    invoke(quantize, tmp_path / "export", "--int8", "--quantize-lm-head", "--out", tmp_path / "shards")
    first, second = stored(tmp_path / "one"), stored(tmp_path / "shards")
    assert {name: t.dtype for name, t in first.items()} == {name: t.dtype for name, t in second.items()}
    values = [name for name, tensor in first.items() if tensor.dtype == torch.int8]
    assert all(torch.equal(first[name], second[name]) for name in values)


def test_an_export_of_other_tools_is_a_source(tmp_path: Path) -> None:
    """bfloat16 scales, activations that are to be quantized as well, a linear left as it was."""
    expected = stored(write_export(tmp_path, lambda tensors, fields: None))
    for name in expected:
        if name.endswith("_scale"):
            expected[name] = expected[name].bfloat16()
    plain = "model.layers.0.mlp.down_proj.weight"
    expected[plain] = torch.randn(expected.pop(plain).shape).bfloat16()
    del expected[f"{plain}_scale"]

    def change(tensors: dict[str, torch.Tensor], fields: dict[str, Any]) -> None:
        tensors.clear()
        tensors.update(expected)
        activations = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
        fields["quantization_config"]["config_groups"]["group_0"] |= {"input_activations": activations}
        fields["quantization_config"]["ignore"].append(plain.removesuffix(".weight"))

    write_export(tmp_path, change)
    invoke(convert, "--source", tmp_path / "export", "--out", tmp_path / "restored")
    assert_same_bits(stored(tmp_path / "restored"), dequantized_by_hand(expected, torch.bfloat16))


def write_export(
    root: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], name: str = "export"
) -> Path:
    """A small export in the compressed-tensors layout, its tensors and its config.json changed."""
    if not (root / "out").exists():
        write_hf(root / "hf")
        invoke(quantize, root / "hf", "--int8", "--out", root / "out")
        invoke(convert, "--source", root / "out", "--out", root / name, "--keep-int8")
    tensors = stored(root / name)
    edit_json(root / name / "config.json", lambda fields: change(tensors, fields))
    save_file(tensors, root / name / "model-00001-of-00001.safetensors", {"format": "pt"})
    for index in (root / name).glob("*.index.json"):
        places = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
        index.write_text(json.dumps({"weight_map": places}))
    return root / name


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, fields: tensors.pop(f"{Q_PROJ}_scale"), [Q_PROJ, "int8"]),
        (lambda tensors, fields: tensors.pop(Q_PROJ), [Q_PROJ, "calls for the tensor weight, but"]),
        (lambda tensors, fields: tensors.update({Q_PROJ: tensors[Q_PROJ].float()}), [Q_PROJ, "float32", "int8"]),
        (
            lambda tensors, fields: tensors.update({f"{Q_PROJ}_scale": torch.ones(16, 2)}),
            [f"{Q_PROJ}_scale", "[16, 2]", "[16, 1]"],
        ),
        (
            lambda tensors, fields: tensors.update({f"{Q_PROJ}_scale": torch.ones(16, 1, dtype=torch.int8)}),
            [f"{Q_PROJ}_scale", "int8"],
        ),
        (
            lambda tensors, fields: tensors.update({"model.norm.weight_scale": torch.ones(16, 1)}),
            ["model.norm.weight"],
        ),
        (lambda tensors, fields: tensors.update({"model.layers.7.x.weight_scale": torch.ones(1)}), ["model.layers.7"]),
        (
            lambda tensors, fields: weights_of(fields).update(strategy="group", group_size=4),
            ["_proj.weight_scale is of shape"],
        ),
        (lambda tensors, fields: weights_of(fields).update(num_bits=3), ["already quantized"]),
        (lambda tensors, fields: weights_of(fields).update(symmetric=False), ["tensor weight_zero_point"]),
        (lambda tensors, fields: fields["quantization_config"].update(format="marlin-24"), ["already quantized"]),
        (lambda tensors, fields: fields["quantization_config"].update(config_groups=[]), ["already quantized"]),
        (lambda tensors, fields: fields.pop("quantization_config"), ["weight_scale"]),
    ],
)
def test_exports_that_are_refused(
    change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], says: list[str], tmp_path: Path
) -> None:
    export = write_export(tmp_path, change)
    refuse(tmp_path, convert, "--source", export, "--out", tmp_path / "restored", says=says)
    refuse(tmp_path, quantize, export, "--int8", "--out", tmp_path / "shards", says=says)


def weights_of(fields: dict[str, Any]) -> dict[str, Any]:
    return fields["quantization_config"]["config_groups"]["group_0"]["weights"]


def test_keep_int8_needs_int8(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    invoke(quantize, tmp_path / "hf", "--bf16", "--out", tmp_path / "bf16")
    for source in (("--source", tmp_path / "hf"), ("--source", tmp_path / "bf16"), ("--config", "tiny")):
        refuse(tmp_path, convert, *source, "--keep-int8", "--out", tmp_path / "out", says=["--keep-int8", "int8"])


def test_a_missing_chip(tmp_path: Path) -> None:
    out = shards_of(tmp_path, "grouped", 3)
    (out / "chip-01-of-03.safetensors").unlink()
    refuse(tmp_path, convert, "--source", out, "--out", tmp_path / "restored", says=["chip-01-of-03.safetensors"])


def test_shards_in_the_place_of_the_output(tmp_path: Path) -> None:
    out = shards_of(tmp_path, "grouped", 3)
    refuse(tmp_path, convert, "--source", out, "--out", out, says=["an input is never changed"])
    refuse(tmp_path, convert, "--source", out, "--out", tmp_path / "one", "--force", says=["--force keeps it"])


def test_fingerprint_follows_the_shards(tmp_path: Path) -> None:
    out = shards_of(tmp_path, "grouped", 3)
    before = open_source(out).fingerprint()
    assert open_source(out).fingerprint() == before
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--chips", 3, "--layers", 1, "--out", out, "--force")
    assert open_source(out).fingerprint() != before
