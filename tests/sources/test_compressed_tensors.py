"""int8 checkpoints of other tools, in the compressed-tensors layout: what is kept, dequantized and refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke, notes, refuse, refuse_source
from models import edit_json, make_model, stored, write_hf
from parity import decode, logits_after, relative
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from converters.cli import command as convert
from quantize.cli import command as quantize

DOWN, HEAD = "model.layers.0.mlp.down_proj.weight", "lm_head.weight"
FIRST_LAYER = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"] + [
    f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
]
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def described(ignore: Iterable[str] = ("lm_head",)) -> dict[str, Any]:
    """The quantization_config that llm-compressor writes for int8 weights alone."""
    unset = dict.fromkeys(("actorder", "block_structure", "group_size", "observer", "scale_dtype", "zp_dtype"))
    group = {"targets": ["Linear"], "weights": WEIGHTS | unset | {"observer": "minmax", "observer_kwargs": {}}}
    group |= {"format": "int-quantized", "input_activations": None, "output_activations": None}
    return {
        "config_groups": {"group_0": group}, "format": "int-quantized", "global_compression_ratio": None,
        "ignore": list(ignore), "kv_cache_scheme": None, "quant_method": "compressed-tensors",
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}, "version": "0.15.0",
    }  # fmt: skip


def int8_of(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales as no quantization to [-127, 127] gives them: every row holds -128, and reaches 100 at most."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 100).to(dtype)
    values = (weight.float() / scale.float()).round().to(torch.int8)
    values[:, 0] = -128
    return values, scale


def write_int8(
    directory: Path, plain: Iterable[str] = (HEAD,), scales: torch.dtype = torch.float32, **fields: Any
) -> dict[str, torch.Tensor]:
    """A small LLaMA with int8 linears, but for those named in ``plain``. Returns its tensors."""
    make_model(directory, **({"layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 8, "vocab": 131} | fields))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name in plain or tensor.dim() == 1 or "embed" in name:
            tensors[name] = tensor
        else:
            tensors[name], tensors[f"{name}_scale"] = int8_of(tensor, scales)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    ignore = [name.removesuffix(".weight") for name in plain]
    edit_json(directory / "config.json", lambda content: content.update(quantization_config=described(ignore)))
    return tensors


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got, expected)


# --- llama-convert --keep-int8


@pytest.mark.parametrize(
    ("plain", "ignore"),
    [
        ([HEAD, DOWN], ["lm_head", "model.layers.0.mlp.down_proj"]),
        ([HEAD, *FIRST_LAYER], ["lm_head", "re:model\\.layers\\.0\\..*"]),
        ([], []),
    ],
    ids=["linear", "layer", "none"],
)
def test_what_is_not_quantized_is_ignored_in_the_export(plain: list[str], ignore: list[str], tmp_path: Path) -> None:
    """transformers finds every tensor that the export's config.json promises, and gives the source's own logits."""
    expected = write_int8(tmp_path / "int8", plain)
    edit_json(tmp_path / "int8" / "config.json", lambda content: content["quantization_config"].update(ignore=ignore))
    invoke(convert, "--source", tmp_path / "int8", "--out", tmp_path / "kept", "--keep-int8", "--dtype", "float32")
    kept = stored(tmp_path / "kept")
    assert kept.keys() == expected.keys()
    assert all(same(kept[name], tensor) for name, tensor in expected.items())
    written = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]["ignore"]
    assert sorted(written) == sorted(name.removesuffix(".weight") for name in plain)
    prompt = [1, 5, 9, 3]
    logits = []
    for name in ("int8", "kept"):
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        logits.append(logits_after(model.eval(), prompt))
    assert torch.equal(*logits)


def test_layers_that_are_cut_off_are_not_named(tmp_path: Path) -> None:
    write_int8(tmp_path / "int8", [HEAD, DOWN, DOWN.replace("0", "1")])
    invoke(convert, "--source", tmp_path / "int8", "--out", tmp_path / "kept", "--keep-int8", "--layers", 1)
    written = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]
    assert written["ignore"] == ["lm_head", DOWN.removesuffix(".weight")]


def test_an_int8_embedding_is_dequantized(tmp_path: Path) -> None:
    tensors = write_int8(tmp_path / "int8")
    embedding = "model.embed_tokens.weight"
    tensors[embedding], tensors[f"{embedding}_scale"] = int8_of(tensors[embedding])
    save_file(tensors, tmp_path / "int8" / "model.safetensors")
    expected = tensors[embedding].float() * tensors[f"{embedding}_scale"]
    for flags, name in ((["--keep-int8"], "kept"), ([], "plain")):
        said = invoke(convert, "--source", tmp_path / "int8", "--out", tmp_path / name, "--dtype", "float32", *flags)
        assert same(stored(tmp_path / name)[embedding], expected)
        assert f"{embedding}_scale" not in stored(tmp_path / name)
        assert [line for line in notes(said) if embedding in line and "dequantized" in line]


# --- llama-quantize --int8


@pytest.mark.parametrize("chips", [1, 3])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_scales_pass_through_llama_quantize(scales: torch.dtype, chips: int, tmp_path: Path) -> None:
    """Bit-equal, but for the scales' dtype; what the source leaves alone is quantized by the formula, and both said."""
    tensors = write_int8(tmp_path / "int8", [HEAD, DOWN], scales)
    said = invoke(quantize, tmp_path / "int8", "--int8", "--chips", chips, "--out", tmp_path / "out")
    invoke(convert, "--source", tmp_path / "out", "--out", tmp_path / "back", "--keep-int8", "--dtype", "float32")
    back = stored(tmp_path / "back")
    for name, tensor in tensors.items():
        if name != DOWN:
            assert same(back[name], tensor.float() if name.endswith("_scale") else tensor), name
    assert back[HEAD].dtype == torch.float32
    scale = tensors[DOWN].abs().amax(1, keepdim=True) / 127
    assert same(back[f"{DOWN}_scale"], scale)
    assert same(back[DOWN], (tensors[DOWN] / scale).round().to(torch.int8))
    kept, here = notes(said)
    assert "kept as the source has them" in kept
    assert "and 10 more" in kept
    assert "Quantized here" in here
    assert DOWN in here
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["worst"] == DOWN
    assert len(report["tensors"]) == 14
    assert {name for name, entry in report["tensors"].items() if entry["max_error"]} == {DOWN}


@pytest.mark.parametrize("flags", [["--int8"], ["--int8", "--quantize-lm-head"], ["--bf16"]], ids=str)
def test_what_the_scheme_does_not_hold_in_int8_is_dequantized(flags: list[str], tmp_path: Path) -> None:
    tensors = write_int8(tmp_path / "int8", [])
    said = notes(invoke(quantize, tmp_path / "int8", *flags, "--out", tmp_path / "out"))
    got = stored(tmp_path / "out")[HEAD]
    if "--quantize-lm-head" in flags:
        assert same(got, tensors[HEAD])
        assert len(said) == 1
    else:
        weight = tensors[HEAD].float() * tensors[f"{HEAD}_scale"]
        assert same(got, weight.bfloat16() if "--bf16" in flags else weight)
        words = "Dequantized from the source's compressed-tensors, 8 bits, a scale for each output, to "
        assert words + str(got.dtype).removeprefix("torch.") in said[-1]
        assert ("--quantize-lm-head" in said[-1]) == ("--int8" in flags)


def test_a_float_source_has_nothing_to_say(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    assert notes(invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "out")) == []


def test_llama_run_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    """Rows that hold -128 are computed with as they are."""
    write_int8(tmp_path / "int8", [])
    invoke(quantize, tmp_path / "int8", "--int8", "--quantize-lm-head", "--chips", 2, "--out", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float32).eval()
    prompt = [1, 5, 9, 3]
    sizes = {"batches": [[prompt]], "new_tokens": 1, "max_seq_len": 64, "buckets": [32]}
    [result] = decode([{"shards": tmp_path / "out", "dtype": "float32", "backend": "eager", **sizes}])
    assert relative(result["logits"][0][0], logits_after(theirs, prompt)[-1]) < 1e-5


def test_a_scale_that_is_not_finite(tmp_path: Path) -> None:
    tensors = write_int8(tmp_path / "int8")
    tensors[f"{DOWN}_scale"][3] = torch.nan
    save_file(tensors, tmp_path / "int8" / "model.safetensors")
    invoke(quantize, tmp_path / "int8", "--int8", "--out", tmp_path / "out", exit_code=2)


# --- quantization_config


def group(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["config_groups"]["group_0"].update(fields)


def weights(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["config_groups"]["group_0"].update(weights=WEIGHTS | fields)


def top(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(fields)


def another_group(**fields: Any) -> Callable[[dict[str, Any]], object]:
    """A second group with its own settings of the weights."""
    second = {"targets": ["re:.*down_proj"], "weights": WEIGHTS | fields}
    return lambda content: content["config_groups"].update(group_1=second)


def write_described(root: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    write_int8(root / "int8", layers=1)
    edit_json(root / "int8" / "config.json", lambda content: change(content["quantization_config"]))
    return root / "int8"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (top(format="marlin-24"), "format 'marlin-24'"),
        (top(format="sparse-bitmask"), "format 'sparse-bitmask'"),
        (top(format="mxfp8-quantized"), "format 'mxfp8-quantized'"),
        (top(format=None), "format None"),
        (top(kv_cache_scheme={"num_bits": 8, "type": "float"}), "kv_cache_scheme"),
        (top(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (top(transform_config={"config_groups": {"u": {"type": "hadamard"}}}), "transform_config"),
        (top(rotation={"kind": "quip"}), "rotation"),
        (top(config_groups={}), "config_groups {}"),
        (top(kv_cache_scheme={}), "kv_cache_scheme {}"),
        (group(output_activations={}), "output_activations {}"),
        (group(input_activations={}), "input_activations"),
        (top(config_groups={"group_0": None}), "weights None in group_0"),
        (group(weights=None), "weights None in group_0"),
        (group(format="marlin-24"), "format 'marlin-24'"),
        (group(targets="Linear"), "targets 'Linear'"),
        (group(targets=["re:["]), "targets ['re:[']"),
        (group(output_activations=ACTIVATIONS), "output_activations"),
        (weights(num_bits=3), "num_bits 3"),
        (weights(type="float"), "type 'float'"),
        (weights(dynamic=True), "dynamic True"),
        (weights(strategy="block"), "strategy 'block'"),
        (weights(strategy="attn_head"), "strategy 'attn_head'"),
        (weights(strategy="group"), "group_size None"),
        (weights(hadamard=True), "hadamard True"),
        (weights(group_size=128), "group_size 128"),
        (weights(actorder="group"), "actorder 'group'"),
        (weights(block_structure=[128, 128]), "block_structure"),
        (another_group(num_bits=3), "num_bits 3"),
    ],
)
def test_what_is_asked_for_beside_int8_is_refused_by_name(
    change: Callable[[dict[str, Any]], object], says: str, tmp_path: Path
) -> None:
    source = write_described(tmp_path, change)
    words = ["already quantized by 'compressed-tensors' with", says]
    refuse(tmp_path, convert, "--source", source, "--out", tmp_path / "out", says=words)
    refuse(tmp_path, quantize, source, "--int8", "--out", tmp_path / "out", says=words)


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        (top(quantization_status="frozen"), []),  # the tensors are int8 all the same
        (top(sparsity_config={"format": "dense"}, transform_config=None), []),
        (top(transform_config={"config_groups": {}}), []),
        (weights(strategy=None, group_size=-1), []),
        (lambda content: content["config_groups"]["group_0"].pop("format"), []),
        (another_group(), []),
        (group(input_activations=ACTIVATIONS), ["8 bits too (input_activations)"]),
        (
            group(input_activations=ACTIVATIONS | {"dynamic": False}),
            ["(input_activations, with scales that are stored)"],
        ),
    ],
)
def test_what_leaves_the_weights_as_they_are_is_read(
    change: Callable[[dict[str, Any]], object], noted: list[str], tmp_path: Path
) -> None:
    source = write_described(tmp_path, change)
    said = notes(invoke(convert, "--source", source, "--out", tmp_path / "kept", "--keep-int8"))
    assert len(said) == len(noted)
    assert all(words in line for words, line in zip(noted, said, strict=True))
    assert same(stored(tmp_path / "kept")[DOWN], stored(source)[DOWN])


@pytest.mark.parametrize("method", ["aqlm", "hqq", "auto-round", "fbgemm_fp8", "modelopt", "GPTQ", None])
def test_other_methods_are_refused_by_name(method: str | None, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", quantization_config={"quant_method": method, "bits": 8})
    refuse_source(tmp_path, f"quantized by {method!r}" if method else "quantized by a method that it doesn't name")


@pytest.mark.parametrize(
    ("ignore", "words"),
    [
        (["lm_head"], []),
        (["re:lm_.*"], []),
        ([], ["lm_head.weight is not quantized, though"]),
        (["lm_head", "model.layers.0.mlp.up_proj"], ["up_proj.weight in ignore, but it is quantized"]),
        (["lm_head", "re:.*layers.0.mlp.(up|down)_proj"], ["down_proj.weight in ignore", "up_proj.weight in ignore"]),
        (["lm_head", "model.layers.0.mlp"], []),  # no module of linears: a name is the whole name
    ],
    ids=str,
)
def test_what_is_stored_counts_before_ignore(ignore: list[str], words: list[str], tmp_path: Path) -> None:
    source = write_described(tmp_path, top(ignore=ignore))
    said = notes(invoke(convert, "--source", source, "--out", tmp_path / "out"))
    assert len(said) == len(words)
    for word in words:
        assert any(word in line for line in said)


@pytest.mark.parametrize("ignore", ["lm_head", [3], ["re:["], {"a": 1}], ids=str)
def test_an_ignore_that_is_none_is_refused(ignore: Any, tmp_path: Path) -> None:
    write_described(tmp_path, top(ignore=ignore))
    refuse_source(tmp_path, "ignore", source="int8")
