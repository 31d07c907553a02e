"""llama-convert --format gguf: values by the gguf library and by this tool's own reader, refusals, kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from invoke import Killed, invoke, kill_at, notes, refuse
from mixtures import FORMATS as MIXTURE
from mixtures import SIZES, shard
from models import edit_json, make_model, make_opt, snapshot, write_hf
from parity import logits_after, relative

from converters.cli import command as convert
from converters.files import row_blocks
from converters.formats.gguf_file import GGUFWriter
from converters.model.families.hf_config import read_config
from converters.sources.gguf.source import open_gguf
from quantize.cli import command as quantize
from quantize.formats.table import FORMATS
from quantize.shards.reading import Shards

TO_GGUF = ("--format", "gguf")
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"heads": 8, "kv_heads": 2, "head_dim": 48, "hidden": 128, "ffn": 256, "vocab": 99},
    "odd": {"heads": 3, "kv_heads": 1, "head_dim": 14, "hidden": 45, "ffn": 96, "vocab": 99, "layers": 1},
    "tied": {"heads": 4, "hidden": 64, "ffn": 96, "vocab": 131, "tied": True, "theta": 50000.0, "eps": 1e-6},
}
# What each format becomes: a type, and whether values and scales go there as they are.
BECOMES = {
    "int8": ("Q8_0", True),
    "int8-zp": ("Q8_0", False),
    "int4": ("Q4_0", True),
    "int4-zp": ("Q8_0", True),
    "fp8": ("Q8_0", False),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf-export")
    for name, sizes in MODELS.items():
        make_model(root / name, **sizes)
    make_opt(root / "opt")
    make_model(root / "mixed", **SIZES)
    return root


def export(source: Path, out: Path, *options: object) -> Path:
    invoke(convert, "--source", source, *TO_GGUF, *options, "--out", out)
    return out / "model.gguf"


def sharded(checkpoint: Path, out: Path, name: str, *options: object, chips: int = 3) -> Path:
    each = FORMATS[name]
    zeros = ["--zero-points"] if each.zero_points else []
    flags = [f"--{each.kind}", "--group-size", each.group_size or "channel", *zeros]
    invoke(quantize, checkpoint, *flags, *options, "--chips", chips, "--out", out)
    return out


def tensors_in(path: Path) -> dict[str, tuple[Type, np.ndarray]]:
    """Types and raw data, by the gguf library."""
    return {tensor.name: (tensor.tensor_type, tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k in the file's order, by reshaping the whole tensor."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def rounded_scales(shards: Shards, name: str) -> torch.Tensor:
    """A weight from its values and scales, these rounded to float16."""
    stored = shards.parameters[name]
    rows = stored.parameter.shape[0]
    parts = {each.name: shards.rows(each.name, 0, rows) for each in stored.tensors}
    parts[name + "_scale"] = parts[name + "_scale"].half().float()
    return stored.decode(parts)


NAMES = [name for name, each in FORMATS.items() if each.quantizes]


@pytest.mark.parametrize("name", NAMES)
def test_values_of_each_format(models: Path, name: str, tmp_path: Path) -> None:
    """Bit for bit: integers as they are, or what the gguf library makes of the dequantized weights."""
    shards = Shards(sharded(models / "grouped", tmp_path / "out", name))
    path = export(tmp_path / "out", tmp_path / "gguf")
    form = FORMATS[name]
    type_name, direct = BECOMES[form.kind + ("-zp" if form.zero_points else "")]
    found, ours = tensors_in(path), open_gguf(path)
    for hf, short in (("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("mlp.down_proj", "ffn_down")):
        weight = f"model.layers.1.{hf}.weight"
        kind, data = found[f"blk.1.{short}.weight"]
        assert kind == Type[type_name]
        rows = shards.parameters[weight].parameter.shape[0]
        expected = rounded_scales(shards, weight) if direct else shards.dequantized(weight, 0, rows)
        in_file = interleaved(expected, 48) if short != "ffn_down" else expected
        if direct:
            assert np.array_equal(gguf.dequantize(data, kind), in_file.numpy())
            assert torch.equal(ours.rows(weight, 0, rows), expected)
        else:
            assert np.array_equal(data, gguf.quantize(in_file.numpy(), kind))
    for hf, short in (("model.embed_tokens", "token_embd"), ("lm_head", "output"), ("model.norm", "output_norm")):
        kind, data = found[f"{short}.weight"]
        assert kind == Type.F32
        assert np.array_equal(data, shards.dequantized(f"{hf}.weight", 0, len(data)).numpy())


@pytest.mark.parametrize(("name", "type_name"), [("int4-g32", "Q4_0"), ("int8-g32", "Q8_0")])
def test_groups_of_32_are_exact(models: Path, name: str, type_name: str, tmp_path: Path) -> None:
    """Scales of these weights are bfloat16 that float16 holds: nothing is rounded, and nothing is said."""
    sharded(models / "grouped", tmp_path / "out", name, "--quantize-lm-head")
    said = invoke(convert, "--source", tmp_path / "out", *TO_GGUF, "--out", tmp_path / "gguf")
    assert notes(said) == []
    assert f"GGUF, {type_name} and F32" in said.stdout
    shards, ours = Shards(tmp_path / "out"), open_gguf(tmp_path / "gguf" / "model.gguf")
    for each in shards.parameters.values():
        rows = each.parameter.shape[0]
        assert torch.equal(ours.rows(each.name, 0, rows), shards.dequantized(each.name, 0, rows).float()), each.name


def test_scales_that_float16_rounds_are_said(models: Path, tmp_path: Path) -> None:
    sharded(models / "grouped", tmp_path / "out", "int8")
    said = invoke(convert, "--source", tmp_path / "out", *TO_GGUF, "--out", tmp_path / "gguf")
    [note] = notes(said)
    assert "scales are no float16" in note
    assert "by 0.0004" in note  # half of float16's last of 11 bits


@pytest.mark.parametrize("name", ["fp8", "int8-g64-zp"])
def test_quantizing_anew_is_said(models: Path, name: str, tmp_path: Path) -> None:
    sharded(models / "grouped", tmp_path / "out", name)
    [note] = notes(invoke(convert, "--source", tmp_path / "out", *TO_GGUF, "--out", tmp_path / "gguf"))
    assert f"Q8_0 doesn't hold {name} as it is: 14 such weights are dequantized and quantized anew" in note


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "F16"])
@pytest.mark.parametrize("source", ["hf", "int8-g128"])
def test_a_type_that_is_asked_for(models: Path, type_name: str, source: str, tmp_path: Path) -> None:
    """Linears of the layers, also of float sources; F16 is for the embeddings and the head as well."""
    whole = models / "grouped" if source == "hf" else sharded(models / "grouped", tmp_path / "out", source)
    found = tensors_in(export(whole, tmp_path / "gguf", "--gguf-type", type_name))
    assert found["blk.0.ffn_up.weight"][0] == Type[type_name]
    assert found["token_embd.weight"][0] == (Type.F16 if type_name == "F16" else Type.F32)
    assert found["blk.0.ffn_norm.weight"][0] == Type.F32
    if source == "hf":
        from models import stored

        weight = stored(models / "grouped")["model.layers.0.mlp.up_proj.weight"].numpy()
        expected = gguf.quantize(weight, Type[type_name])
        assert np.array_equal(found["blk.0.ffn_up.weight"][1].view(np.uint8), expected.view(np.uint8))


def test_dtype_of_what_is_not_quantized(models: Path, tmp_path: Path) -> None:
    sharded(models / "grouped", tmp_path / "out", "int4-g32")
    for dtype, kind in (("bfloat16", Type.BF16), ("float16", Type.F16)):
        path = export(tmp_path / "out", tmp_path / dtype, "--dtype", dtype)
        assert tensors_in(path)["token_embd.weight"][0] == kind
        ours = open_gguf(path).rows("model.embed_tokens.weight", 0, 99)
        exact = Shards(tmp_path / "out").dequantized("model.embed_tokens.weight", 0, 99)
        assert torch.equal(ours, exact.to(getattr(torch, dtype)).float())


def test_a_mixture(models: Path, tmp_path: Path) -> None:
    shard(models / "mixed", tmp_path / "out", 3, MIXTURE)
    found = tensors_in(export(tmp_path / "out", tmp_path / "gguf"))
    for name, kind in (
        ("blk.0.attn_q", Type.Q4_0), ("blk.0.attn_k", Type.Q8_0), ("blk.0.attn_v", Type.F32),
        ("blk.0.attn_output", Type.Q8_0), ("blk.1.ffn_gate", Type.Q8_0), ("output", Type.Q8_0),
    ):  # fmt: skip
        assert found[f"{name}.weight"][0] == kind, name


def test_widths_that_blocks_do_not_divide(models: Path, tmp_path: Path) -> None:
    sharded(models / "odd", tmp_path / "out", "int8")
    said = notes(invoke(convert, "--source", tmp_path / "out", *TO_GGUF, "--out", tmp_path / "gguf"))
    assert any("mlp.up_proj.weight has 45 inputs, no multiple of 32: it is written in F32" in each for each in said)
    found = tensors_in(tmp_path / "gguf" / "model.gguf")
    assert (found["blk.0.ffn_up.weight"][0], found["blk.0.ffn_down.weight"][0]) == (Type.F32, Type.Q8_0)
    shards = Shards(tmp_path / "out")
    up = shards.dequantized("model.layers.0.mlp.up_proj.weight", 0, 96)
    assert torch.equal(open_gguf(tmp_path / "gguf" / "model.gguf").rows("model.layers.0.mlp.up_proj.weight", 0, 96), up)


@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_the_way_back(models: Path, name: str, tmp_path: Path) -> None:
    """Shards to GGUF to a checkpoint: the same configuration, and transformers gives the logits of the shards."""
    from transformers import AutoModelForCausalLM

    sharded(models / name, tmp_path / "out", "int4-g32")
    export(tmp_path / "out", tmp_path / "gguf")
    invoke(convert, "--source", tmp_path / "gguf", "--dtype", "float32", "--out", tmp_path / "back")
    invoke(convert, "--source", tmp_path / "out", "--dtype", "float32", "--out", tmp_path / "restored")
    ours, again = (read_config(tmp_path / each / "config.json") for each in ("restored", "back"))
    for field in ("hidden_size", "num_kv_heads", "head_dim", "norm_eps", "rope_theta", "tie_word_embeddings"):
        assert getattr(ours, field) == getattr(again, field), field
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / each, dtype=torch.float32) for each in ("restored", "back")
    )
    assert relative(logits_after(first, [1, 5, 9]), logits_after(second, [1, 5, 9])) == 0


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rope_scaling(scaling: dict[str, Any], tmp_path: Path) -> None:
    make_model(tmp_path / "hf", heads=2, hidden=256, ffn=64, theta=500000.0)

    def scale(fields: dict[str, Any]) -> None:
        fields.pop("rope_parameters", None)
        fields |= {"rope_theta": 500000.0, "rope_scaling": scaling, "max_position_embeddings": 131072}

    edit_json(tmp_path / "hf" / "config.json", scale)
    path = export(tmp_path / "hf", tmp_path / "gguf")
    assert open_gguf(path).config.rope_scaling == read_config(tmp_path / "hf" / "config.json").rope_scaling
    assert ("rope_freqs.weight" in tensors_in(path)) == (scaling["rope_type"] == "llama3")


def test_random_weights(tmp_path: Path) -> None:
    said = invoke(convert, "--config", "tiny", "--layers", 1, *TO_GGUF, "--out", tmp_path / "out").stdout
    assert "GGUF, BF16" in said
    assert open_gguf(tmp_path / "out" / "model.gguf").config.num_layers == 1


@pytest.mark.parametrize("name", ["int4-g32", "fp8"])
def test_blocks_of_rows_change_nothing(
    models: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end within a head, too."""
    sharded(models / "grouped", tmp_path / "out", name)
    whole = export(tmp_path / "out", tmp_path / "gguf").read_bytes()
    monkeypatch.setattr(row_blocks.row_blocks, "__defaults__", (700,))
    assert export(tmp_path / "out", tmp_path / "small").read_bytes() == whole


@pytest.mark.parametrize("calls", [1, 9, 20])
def test_killed_and_run_again(models: Path, calls: int, tmp_path: Path) -> None:
    sharded(models / "grouped", tmp_path / "out", "int4-g32")
    export(tmp_path / "out", tmp_path / "whole")
    whole, append, left = snapshot(tmp_path / "whole"), GGUFWriter.append, [calls]

    def kill_later(writer: GGUFWriter, block: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        append(writer, block)

    arguments = ("--source", tmp_path / "out", *TO_GGUF, "--out", tmp_path / "again")
    kill_at(GGUFWriter, "append", convert, *arguments, instead=kill_later)
    assert "model.gguf" not in snapshot(tmp_path / "again")
    invoke(convert, *arguments)
    assert snapshot(tmp_path / "again") == whole
    assert "already complete" in invoke(convert, *arguments).stdout
    assert "every digest as it was written" in invoke(convert, "--verify", "--out", tmp_path / "again").stdout
    refuse(tmp_path, convert, *arguments, "--gguf-type", "Q8_0", says=["gguf_type", "--force"])
    invoke(convert, *arguments, "--gguf-type", "Q8_0", "--force")
    assert snapshot(tmp_path / "again") != whole


def test_opt_is_refused(models: Path, tmp_path: Path) -> None:
    refuse(tmp_path, convert, "--source", models / "opt", *TO_GGUF, "--out", tmp_path / "out", says=["knows no OPT"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gguf-type", "Q8_0"], ["--gguf-type", "--format gguf"]),
        ([*TO_GGUF, "--int8-layout", "packed"], ["--int8-layout", "--format compressed-tensors"]),
        ([*TO_GGUF, "--storage", "seed"], ["--storage seed"]),
        ([*TO_GGUF, "--keep-int8"], ["--keep-int8"]),
        ([*TO_GGUF, "--check-logits"], ["--check-logits"]),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(models: Path, options: list[object], says: list[str], tmp_path: Path) -> None:
    source = ("--source", sharded(models / "grouped", tmp_path / "out", "int8"))
    refuse(tmp_path, convert, *source, *options, "--out", tmp_path / "gguf", says=says)


def test_a_missing_chip_and_foreign_files(models: Path, tmp_path: Path) -> None:
    sharded(models / "grouped", tmp_path / "out", "int4-g32")
    arguments = ("--source", tmp_path / "out", *TO_GGUF, "--out", tmp_path / "gguf")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    refuse(tmp_path, convert, *arguments, says=["already holds other files"])
    refuse(tmp_path, convert, *arguments, "--force", says=["was not written by this tool"])
    (tmp_path / "out" / "chip-01-of-03.safetensors").unlink()
    refuse(tmp_path, convert, *arguments, says=["chip-01-of-03.safetensors"])


def test_values_beyond_float16(tmp_path: Path) -> None:
    from models import random_tensors

    name = "model.layers.0.mlp.up_proj.weight"
    tensors = random_tensors()
    tensors[name][0, 0] = 1e5
    write_hf(tmp_path / "hf", tensors)
    arguments = ("--source", tmp_path / "hf", *TO_GGUF, "--gguf-type", "F16", "--out", tmp_path / "out")
    line = invoke(convert, *arguments, exit_code=2).stderr
    assert name in line
    assert "--gguf-type" in line
