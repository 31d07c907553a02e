"""llama-convert --format compressed-tensors: shards' values in the layouts that vLLM and transformers take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from invoke import Killed, invoke, kill_at, refuse
from mixtures import FORMATS as MIXTURE
from mixtures import SIZES, shard
from models import edit_json, make_model, make_opt, snapshot, stored, write_hf
from parity import decode, logits_after, reference, relative
from transformers import AutoModelForCausalLM

from converters.cli import command as convert
from converters.files import row_blocks
from converters.formats.safetensors import SafetensorsWriter
from quantize.cli import command as quantize
from quantize.formats.table import FORMATS
from quantize.shards.reading import Shards

NAMES = [name for name, each in FORMATS.items() if each.quantizes]
LAYOUTS = {"int4": "pack-quantized", "int8": "pack-quantized", "fp8": "float-quantized"}
TO_COMPRESSED = ("--format", "compressed-tensors")
# The widths of the first are multiples of 128; those of the others, and their numbers of rows, of 2 at most.
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"heads": 8, "kv_heads": 2, "head_dim": 48, "hidden": 128, "ffn": 256, "vocab": 99},
    "odd": {"heads": 3, "kv_heads": 1, "head_dim": 14, "hidden": 45, "ffn": 171, "vocab": 99, "layers": 1},
    "tied": {"heads": 5, "hidden": 80, "ffn": 192, "vocab": 131, "tied": True},
    "opt": {"heads": 4, "hidden": 64, "ffn": 128, "width": 32, "vocab": 131},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    for name, sizes in MODELS.items():
        (make_opt if name == "opt" else make_model)(root / name, **sizes)
    make_model(root / "mixed", **SIZES)
    return root


def exported(checkpoint: Path, root: Path, flags: list[object], *options: object, chips: int = 3) -> Path:
    """The export of shards in ``root``/out."""
    invoke(quantize, checkpoint, *flags, "--chips", chips, "--out", root / "out")
    invoke(convert, "--source", root / "out", *TO_COMPRESSED, *options, "--out", root / "export")
    return root / "export"


def flags_of(name: str) -> list[object]:
    each = FORMATS[name]
    zeros = ["--zero-points"] if each.zero_points else []
    return [f"--{each.kind}", "--group-size", each.group_size or "channel", *zeros]


def scheme_of(described: QuantizationConfig, module: str) -> QuantizationScheme:
    """The config group of a linear."""
    return next(each for each in described.config_groups.values() if {"Linear", module} & set(each.targets))


def check_against_shards(export: Path, shards: Path) -> int:
    """Values, scales and zero points are the shards', and the library decompresses to the same weights, bit for bit.

    Returns how many weights are quantized.
    """
    whole, tensors = Shards(shards), stored(export)
    described = described_in(export)
    quantized = [each for each in whole.parameters.values() if each.format.quantizes]
    names = set()
    for each in quantized:
        module, (rows, width) = each.name.removesuffix(".weight"), each.parameter.shape
        scheme = scheme_of(described, module)
        held = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        names |= {f"{module}.{name}" for name in held}
        held.pop("bias", None)
        parts = {part.suffix: whole.rows(each.name + part.suffix, 0, rows) for part in each.format.parts}
        values, bits = parts[each.format.parts[0].suffix], scheme.weights.num_bits
        if scheme.format == "pack-quantized":
            assert held["weight_shape"].tolist() == [rows, width]
            assert held["weight_shape"].dtype == torch.int64
            assert torch.equal(unpack_from_int32(held["weight_packed"], bits, (rows, width)), values)
        else:
            assert torch.equal(held["weight"].view(torch.uint8), values.view(torch.uint8))
        assert held["weight_scale"].dtype == parts["_scale"].dtype
        assert torch.equal(held["weight_scale"], parts["_scale"])
        if each.format.zero_points:
            shape = parts["_zero_point"].shape
            assert torch.equal(unpack_from_int32(held["weight_zero_point"], bits, shape, 0), parts["_zero_point"])
        exact = held | {"weight_scale": held["weight_scale"].float()}
        theirs = BaseCompressor.get_value_from_registry(scheme.format).decompress(exact, scheme)["weight"]
        assert torch.equal(theirs, whole.dequantized(each.name, 0, rows)), each.name
    others = {each.name for each in whole.parameters.values()} - {each.name for each in quantized}
    assert tensors.keys() == names | others
    for name in others:
        assert torch.equal(tensors[name], whole.dequantized(name, 0, len(tensors[name])))
    return len(quantized)


def described_in(export: Path) -> QuantizationConfig:
    fields = json.loads((export / "config.json").read_text())
    return QuantizationConfig.model_validate(fields["quantization_config"])


@pytest.mark.parametrize("name", NAMES)
def test_values_and_description_of_each_format(models: Path, name: str, tmp_path: Path) -> None:
    each = FORMATS[name]
    export = exported(models / ("grouped" if each.group_size else "odd"), tmp_path, flags_of(name))
    assert check_against_shards(export, tmp_path / "out") == (14 if each.group_size else 7)
    described = described_in(export)
    [(group, scheme)] = described.config_groups.items()
    assert (group, scheme.targets, described.ignore) == ("group_0", ["Linear"], ["lm_head"])
    assert described.format == scheme.format == LAYOUTS[each.kind]
    assert scheme.input_activations is None
    weights = scheme.weights
    kind, bits = ("float", 8) if each.kind == "fp8" else ("int", int(each.kind[-1]))
    assert (weights.type, weights.num_bits, weights.symmetric) == (kind, bits, not each.zero_points)
    assert (weights.strategy, weights.group_size) == ("group" if each.group_size else "channel", each.group_size)


@pytest.mark.parametrize("chips", [1, 3])
def test_a_mixture(models: Path, chips: int, tmp_path: Path) -> None:
    shard(models / "mixed", tmp_path / "out", chips, MIXTURE)
    said = invoke(convert, "--source", tmp_path / "out", *TO_COMPRESSED, "--out", tmp_path / "export").stdout
    assert "int4-g64 pack-quantized, int8 pack-quantized" in said
    assert "fp8 float-quantized" in said
    quantized = [name for name, form in MIXTURE.items() if form != "unquantized"]
    assert check_against_shards(tmp_path / "export", tmp_path / "out") == len(quantized)
    described = described_in(tmp_path / "export")
    assert described.format == "mixed-precision"
    listed = [name for each in described.config_groups.values() for name in each.targets]
    assert sorted(listed) == sorted(name.removesuffix(".weight") for name in quantized)
    assert sorted(described.ignore) == sorted({name.removesuffix(".weight") for name in MIXTURE} - set(listed))


RUNS: list[tuple[str, list[object]]] = [
    ("grouped", ["--int4", "--group-size", 64]),
    ("grouped", ["--int4", "--zero-points", "--quantize-lm-head"]),
    ("grouped", ["--int8"]),
    ("grouped", ["--int8", "--group-size", 32, "--zero-points"]),
    ("grouped", ["--fp8"]),
    ("tied", ["--int4", "--group-size", "channel"]),
    ("opt", ["--int4", "--group-size", 32]),
    ("opt", ["--int8"]),
]
PROMPTS = [[1, 5, 9, 3], list(range(20, 70))]


def logits_of(shards: Path) -> list[torch.Tensor]:
    """Our eager session's logits in float32 after each of PROMPTS."""
    sizes = {"batches": [[prompt] for prompt in PROMPTS], "new_tokens": 1, "max_seq_len": 64, "buckets": [32]}
    [result] = decode([{"shards": shards, "dtype": "float32", "backend": "eager", **sizes}])
    return [logits[0] for logits in result["logits"]]


@pytest.mark.parametrize(("model", "flags"), RUNS, ids=str)
def test_transformers_runs_it_as_llama_run_does(models: Path, model: str, flags: list[object], tmp_path: Path) -> None:
    export = exported(models / model, tmp_path, flags)
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    for prompt, logits in zip(PROMPTS, logits_of(tmp_path / "out"), strict=True):
        assert relative(logits, logits_after(theirs, prompt)[-1]) < 1e-3


def test_transformers_runs_a_mixture(models: Path, tmp_path: Path) -> None:
    shard(models / "mixed", tmp_path / "out", 1, MIXTURE)
    invoke(convert, "--source", tmp_path / "out", *TO_COMPRESSED, "--out", tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    for prompt, logits in zip(PROMPTS, logits_of(tmp_path / "out"), strict=True):
        assert relative(logits, logits_after(theirs, prompt)[-1]) < 1e-3


def test_int8_with_activations(models: Path, tmp_path: Path) -> None:
    """Tensors as --keep-int8 writes them; transformers makes activations int8, token by token."""
    export = exported(models / "grouped", tmp_path, ["--int8"], "--int8-layout", "activations", chips=1)
    invoke(convert, "--source", tmp_path / "out", "--keep-int8", "--out", tmp_path / "kept")
    expected = stored(tmp_path / "kept")
    got = stored(export)
    assert list(got) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
    [scheme] = described_in(export).config_groups.values()
    activations = scheme.input_activations
    assert (scheme.format, activations.num_bits, activations.type) == ("int-quantized", 8, "int")
    assert (activations.strategy, activations.dynamic, activations.symmetric) == ("token", True, True)
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    by_hand = reference(models / "grouped", tmp_path / "out")
    for name, module in by_hand.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, inputs: (as_int8(inputs[0]),))
    for prompt, exact in zip(PROMPTS, logits_of(tmp_path / "out"), strict=True):
        found = logits_after(theirs, prompt)[-1]
        assert relative(found, exact) > 1e-3
        assert relative(found, logits_after(by_hand, prompt)[-1]) < 1e-3


def as_int8(x: torch.Tensor) -> torch.Tensor:
    """Activations rounded to what the library's dynamic int8 can hold: its steps are 2 / 255 of the largest."""
    unit = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / unit).round().clamp(-128, 127) * unit


def test_the_layout_is_said(models: Path, tmp_path: Path) -> None:
    invoke(quantize, models / "grouped", "--int8", "--out", tmp_path / "out")
    source = ("--source", tmp_path / "out", *TO_COMPRESSED, "--dry-run", "--out", tmp_path / "export")
    assert "int8 pack-quantized and float32" in invoke(convert, *source).stdout
    said = invoke(convert, *source, "--int8-layout", "activations").stdout
    assert "int8 int-quantized, int8 activations (--int8-layout activations) and float32" in said


def test_files_layers_and_dtype(models: Path, tmp_path: Path) -> None:
    invoke(quantize, models / "grouped", "--int4", "--chips", 3, "--out", tmp_path / "out")
    arguments = ("--source", tmp_path / "out", *TO_COMPRESSED, "--layers", 1, "--dtype", "bfloat16")
    invoke(convert, *arguments, "--max-shard-size", "20KB", "--out", tmp_path / "export", "--verify")
    files = sorted(tmp_path.glob("export/*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    tensors = stored(tmp_path / "export")
    assert index["weight_map"].keys() == tensors.keys()
    assert not [name for name in tensors if "layers.1." in name]
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("flags", [["--int4", "--zero-points", "--group-size", 32], ["--int8"]], ids=str)
def test_blocks_of_rows_change_nothing(
    models: Path, flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = exported(models / "grouped", tmp_path, flags)
    monkeypatch.setattr(row_blocks.row_blocks, "__defaults__", (100,))
    again = ("--source", tmp_path / "out", *TO_COMPRESSED, "--out", tmp_path / "small")
    invoke(convert, *again)
    assert snapshot(tmp_path / "small") == snapshot(export)


@pytest.mark.parametrize("calls", [1, 9, 30])
def test_killed_and_run_again(models: Path, calls: int, tmp_path: Path) -> None:
    export = exported(models / "grouped", tmp_path, ["--int4"], "--max-shard-size", "40KB")
    whole, append, left = snapshot(export), SafetensorsWriter.append, [calls]

    def kill_later(writer: SafetensorsWriter, block: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        append(writer, block)

    arguments = ("--source", tmp_path / "out", *TO_COMPRESSED, "--max-shard-size", "40KB", "--out", tmp_path / "again")
    kill_at(SafetensorsWriter, "append", convert, *arguments, instead=kill_later)
    assert snapshot(tmp_path / "again") != whole
    invoke(convert, *arguments)
    assert snapshot(tmp_path / "again") == whole
    assert "already complete" in invoke(convert, *arguments).stdout
    refuse(tmp_path, convert, "--source", tmp_path / "out", "--out", tmp_path / "again", says=["format", "--force"])


def test_check_logits(models: Path, tmp_path: Path) -> None:
    invoke(quantize, models / "grouped", "--int4", "--out", tmp_path / "out")
    arguments = ("--source", tmp_path / "out", *TO_COMPRESSED, "--out", tmp_path / "export")
    assert "Logits:" in invoke(convert, *arguments, "--check-logits").stdout


@pytest.mark.parametrize(
    ("flags", "options", "says"),
    [
        (["--bf16"], [*TO_COMPRESSED], ["--format compressed-tensors", "llama-quantize"]),
        (["--int4", "--group-size", 32], [*TO_COMPRESSED, "--int8-layout", "packed"], ["--int8-layout packed"]),
        (["--fp8"], [*TO_COMPRESSED, "--int8-layout", "activations"], ["--int8-layout activations"]),
        (
            ["--int8", "--group-size", 32],
            [*TO_COMPRESSED, "--int8-layout", "activations"],
            ["int8-g32", "layers.0.self_attn.q_proj.weight", "--int8-layout activations"],
        ),
        (["--int8", "--zero-points"], [*TO_COMPRESSED, "--int8-layout", "activations"], ["int8-zp"]),
        (["--int8"], ["--int8-layout", "packed"], ["--int8-layout", "--format compressed-tensors"]),
        (["--int8"], [*TO_COMPRESSED, "--keep-int8"], ["--keep-int8", "--format hf"]),
        (["--int8"], [*TO_COMPRESSED, "--int8-layout", "activations", "--check-logits"], ["--check-logits"]),
    ],
    ids=str,
)
def test_what_is_refused(
    models: Path, flags: list[object], options: list[object], says: list[str], tmp_path: Path
) -> None:
    invoke(quantize, models / "grouped", *flags, "--out", tmp_path / "out")
    refuse(tmp_path, convert, "--source", tmp_path / "out", *options, "--out", tmp_path / "export", says=says)


def test_sources_without_quantized_weights(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    for source in (("--source", tmp_path / "hf"), ("--config", "tiny")):
        refuse(tmp_path, convert, *source, *TO_COMPRESSED, "--out", tmp_path / "out", says=["quantized shards"])


def test_a_missing_chip_and_foreign_files(models: Path, tmp_path: Path) -> None:
    invoke(quantize, models / "grouped", "--int4", "--chips", 3, "--out", tmp_path / "out")
    arguments = ("--source", tmp_path / "out", *TO_COMPRESSED, "--out", tmp_path / "export")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    refuse(tmp_path, convert, *arguments, says=["export"])
    refuse(tmp_path, convert, *arguments, "--force", says=["was not written by this tool"])
    (tmp_path / "out" / "chip-01-of-03.safetensors").unlink()
    refuse(tmp_path, convert, *arguments, says=["chip-01-of-03.safetensors"])


def test_the_self_check_sees_another_group(models: Path, tmp_path: Path) -> None:
    """Headers are held against what config.json says of the layout."""
    from converters.console.errors import InputError
    from converters.self_check import check_files

    export = exported(models / "grouped", tmp_path, ["--int4", "--group-size", 64])
    files = [path.name for path in export.glob("*.safetensors")]
    assert check_files(export, files).tensors == 2 * (7 * 3 + 2) + 3

    def widen(fields: dict[str, Any]) -> None:
        fields["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 32

    edit_json(export / "config.json", widen)
    with pytest.raises(InputError, match=r"weight_scale in shape \(\d+, \d\)"):
        check_files(export, files)
