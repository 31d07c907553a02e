"""Shards of weights in several formats: what they hold on any number of chips, and what files say of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import decoded, quantized_names
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from invoke import invoke, refuse
from mixtures import FORMATS, SIZES, shard, weights_by_hand
from models import edit_json, make_model, stored
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from converters.cli import command as convert
from converters.console.errors import InputError
from quantize.cli import command as quantize
from quantize.formats import table
from quantize.shards.reading import Shards

CHIPS = (1, 2, 3, 4, 8)
DOWN = "model.layers.{}.mlp.down_proj.weight"


class Made:
    """A model, and its shards for any number of chips, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.checkpoint = root, root / "hf"
        make_model(self.checkpoint, **SIZES)

    def shards(self, chips: int) -> Path:
        out = self.root / f"out{chips}"
        return out if out.exists() else shard(self.checkpoint, out, chips)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("mixture"))


def digests(directory: Path) -> dict[str, str]:
    """Of every file but the record of the run."""
    files = [path for path in directory.iterdir() if path.name != ".written.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_weight_is_in_its_format(made: Made) -> None:
    """The bits of the whole model in that format alone."""
    held = load_file(made.shards(1) / "chip-00-of-01.safetensors")
    uniform = {}
    for name in {*FORMATS.values()} - {"unquantized"}:
        each = table.FORMATS[name]
        flags = [f"--{each.kind}", "--group-size", each.group_size or "channel", "--quantize-lm-head"]
        flags += ["--zero-points"] if each.zero_points else []
        invoke(quantize, made.checkpoint, *flags, "--out", made.root / name)
        uniform[name] = load_file(made.root / name / "chip-00-of-01.safetensors")
    expected = stored(made.checkpoint)
    for weight, form in FORMATS.items():
        if form != "unquantized":
            del expected[weight]
            expected |= {name: tensor for name, tensor in uniform[form].items() if name.startswith(weight)}
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        assert held[name].dtype == tensor.dtype
        assert torch.equal(held[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("chips", CHIPS[1:])
def test_values_do_not_depend_on_chips(made: Made, chips: int) -> None:
    """Chips hold, in turn, what one chip holds, and zeros; gate and up split their outputs as down does its inputs."""
    directory, whole = made.shards(chips), weights_by_hand(made.shards(1))
    entries = json.loads((directory / "shards.json").read_text())["tensors"]
    files = [load_file(directory / f"chip-{chip:02d}-of-{chips:02d}.safetensors") for chip in range(chips)]
    quantized = quantized_names(files[0])
    for weight in FORMATS:
        entry = entries.get(weight + "_packed", entries.get(weight))
        axis, width = entry["shard_axis"], entry["shape"][1]
        local_width = (width + entry["padding"]) // chips if axis == 1 else width
        parts = [
            torch.from_numpy(decoded(file, weight, local_width)).float() if weight in quantized else file[weight]
            for file in files
        ]
        lines, expected = (each if axis == 0 else each.T for each in (torch.cat(parts, axis), whole[weight]))
        distinct = dict.fromkeys(row.numpy().tobytes() for row in lines if row.any())
        assert list(distinct) == [row.numpy().tobytes() for row in expected], weight
    for layer in range(SIZES["layers"]):
        for chip in range(chips):
            held = [
                _held(files[chip], whole, weight, axis)
                for weight, axis in ((f"model.layers.{layer}.mlp.gate_proj.weight", 0), (DOWN.format(layer), 1))
            ]
            assert np.array_equal(*held), (layer, chip)


def _held(file: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], weight: str, axis: int) -> np.ndarray:
    """The places, along an axis of a whole weight, of what a chip's file holds of it; -1 for zeros."""
    lines = whole[weight] if axis == 0 else whole[weight].T
    places = {row.numpy().tobytes(): place for place, row in enumerate(lines)}
    values = file.get(weight + "_packed", file.get(weight))
    width = lines.shape[1]
    if axis == 1:
        scale = file.get(weight + "_scale")
        width = values.shape[1] * (8 if values.dtype == torch.int32 else 1)
        width = _ffn_length(file, weight) if scale is not None else width
    mine = file[weight] if weight + "_scale" not in file else torch.from_numpy(decoded(file, weight, width)).float()
    mine = mine if axis == 0 else mine.T
    return np.array([places.get(row.numpy().tobytes(), -1) for row in mine])


def _ffn_length(file: dict[str, torch.Tensor], down: str) -> int:
    """How many inputs of down a chip holds: as many as outputs of gate, which no format packs."""
    gate = down.replace("down_proj", "gate_proj")
    return len(file.get(gate + "_packed", file.get(gate)))


@pytest.mark.parametrize("chips", [1, 3])
def test_each_layer_is_split_by_its_own_groups(made: Made, chips: int) -> None:
    """On three chips what takes least, worked out by hand for groups of 64, of 32, and none: layer by layer."""
    shapes = {
        layer: load_file(made.shards(chips) / f"chip-00-of-{chips:02d}.safetensors") for layer in range(SIZES["layers"])
    }
    found = [_ffn_length(shapes[layer], DOWN.format(layer)) for layer in range(SIZES["layers"])]
    # 112 are 7 scales' halves or quarters: 336 * 12 + 21 * 16 bits a row, of whole groups 384 * 12 + 6 * 16 or more.
    assert found == ([320, 320, 320] if chips == 1 else [112, 112, 107])


def test_resharded(made: Made, tmp_path: Path) -> None:
    """8 -> 3 -> 4 chips, in the command line without naming a format: the same files as of 4 chips at once."""
    invoke(quantize, made.shards(8), "--chips", 3, "--out", tmp_path / "three")
    assert digests(tmp_path / "three") == digests(made.shards(3))
    said = invoke(quantize, tmp_path / "three", "--chips", 4, "--out", tmp_path / "four").stdout
    assert "mixed (int4-g64 32%, fp32 25%, " in said
    assert digests(tmp_path / "four") == digests(made.shards(4))
    assert "every digest" in invoke(quantize, "--verify", "--out", tmp_path / "four").stdout
    assert "already complete" in invoke(quantize, tmp_path / "three", "--chips", 4, "--out", tmp_path / "four").stdout
    (tmp_path / "four" / ".written.json").unlink()
    assert "already complete" in invoke(quantize, tmp_path / "three", "--chips", 4, "--out", tmp_path / "four").stdout


def test_resharding_from_python(made: Made, tmp_path: Path) -> None:
    """With the formats that the shards have; others are refused, and another way to find scales."""
    assert digests(shard(made.shards(2), tmp_path / "new", 3)) == digests(made.shards(3))
    for changes in ({"formats": FORMATS | {DOWN.format(0): "int4"}}, {"method": "rtn"}):
        with pytest.raises(InputError, match="they can only be re-sharded without options for one"):
            shard(made.shards(2), tmp_path / "other", 3, **changes)


@pytest.mark.parametrize("flags", [("--int4", "--group-size", 64), ("--int8",), ("--quantize-lm-head", "--bf16")])
def test_resharding_in_one_format_is_refused(made: Made, flags: tuple[object, ...], tmp_path: Path) -> None:
    source = made.shards(2)
    says = ["out2 holds shards of several formats; they can only be re-sharded without options for one"]
    refuse(tmp_path, quantize, source, *flags, "--out", tmp_path / "new", says=says)


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_are_cut(made: Made, layers: int, tmp_path: Path) -> None:
    """Nothing is said of the others; as quantized at once, or re-sharded."""
    shard(made.checkpoint, tmp_path / "direct", 3, layers=layers)
    invoke(quantize, made.shards(2), "--layers", layers, "--chips", 3, "--out", tmp_path / "cut")
    one, other = digests(tmp_path / "direct"), digests(tmp_path / "cut")
    assert one.pop("quantization_report.json") != other.pop("quantization_report.json")  # of all that was quantized
    assert one == other
    formats = json.loads((tmp_path / "cut" / "shards.json").read_text())["formats"]
    assert formats
    assert not [name for names in formats.values() for name in names if f"layers.{layers}" in name]


def test_one_format_left_by_a_cut_is_no_mixture(made: Made, tmp_path: Path) -> None:
    formats = dict.fromkeys(FORMATS, "int8") | {DOWN.format(2): "int4-g32"}
    shard(made.checkpoint, tmp_path / "mixed", 2, formats)
    shard(made.checkpoint, tmp_path / "cut", 2, formats, layers=2)
    invoke(
        quantize,
        made.checkpoint,
        "--int8",
        "--quantize-lm-head",
        "--layers",
        2,
        "--chips",
        2,
        "--out",
        tmp_path / "int8",
    )
    assert digests(tmp_path / "cut") == digests(tmp_path / "int8")
    versions = [
        json.loads((tmp_path / name / "shards.json").read_text())["format_version"] for name in ("mixed", "cut")
    ]
    assert versions == [3, 2]


# --- shards.json


def test_the_manifest_says_what_is_in_another_format(made: Made) -> None:
    content = json.loads((made.shards(3) / "shards.json").read_text())
    described = {key: content[key] for key in ("format_version", "scheme", "group_size", "zero_points", "method")}
    assert described == {
        "format_version": 3,
        "scheme": "int4",
        "group_size": 64,
        "zero_points": False,
        "method": "scale",
    }
    found = {name: form for form, names in content["formats"].items() for name in names}
    assert found == {name: form for name, form in FORMATS.items() if form != "int4-g64"}
    assert list(content["formats"])[-1] == "unquantized"
    report = json.loads((made.shards(3) / "quantization_report.json").read_text())["tensors"]
    assert report.keys() == {name for name, form in FORMATS.items() if form != "unquantized"}
    assert report[DOWN.format(1)]["relative_error"] > 3 * report[DOWN.format(0)]["relative_error"] > 0


def test_methods_are_recorded_where_a_format_has_the_choice(made: Made, tmp_path: Path) -> None:
    def method(name: str, formats: dict[str, str], **changes: Any) -> str | None:
        shard(made.checkpoint, tmp_path / name, 1, formats, **changes)
        Shards(tmp_path / name)
        return json.loads((tmp_path / name / "shards.json").read_text())["method"]

    assert method("rtn", FORMATS, method="rtn") == "rtn"
    assert digests(tmp_path / "rtn") != digests(made.shards(1))
    assert method("none", {name: "fp8" if "q_proj" in name else "int8" for name in FORMATS}) is None


def test_names_are_in_the_order_of_the_layers(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", heads=2, hidden=8, ffn=8, layers=11, vocab=40)
    names = [name.replace(".0.", f".{layer}.") for layer in range(11) for name in FORMATS if ".0." in name]
    formats = dict.fromkeys(names, "int8") | {DOWN.format(layer): "fp8" for layer in (10, 9, 0)}
    content = json.loads((shard(tmp_path / "hf", tmp_path / "out", 1, formats) / "shards.json").read_text())
    assert content["formats"] == {"fp8": [DOWN.format(layer) for layer in (0, 9, 10)]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content.update(format_version=4), "of format version 4"),
        (lambda content: content.update(format_version=2), "lists other tensors"),
        (lambda content: content.pop("formats"), "damaged"),
        (lambda content: content.update(formats={}), "damaged"),
        (lambda content: content.update(formats=[]), "damaged"),
        (lambda content: content["formats"].update(int8=None), "damaged"),
        (lambda content: content["formats"].update(int8=[]), "damaged"),
        (lambda content: content["formats"].update(int8=[["model"]]), "damaged"),
        (lambda content: content["formats"].update({"int5": content["formats"].pop("int8")}), "damaged"),
        (lambda content: content["formats"].update({"bf16": content["formats"].pop("unquantized")}), "damaged"),
        (lambda content: content["formats"].update({"int4-g64": [DOWN.format(0)]}), "damaged"),  # the default
        (lambda content: content["formats"]["int8"].append(content["formats"]["int8"][0]), "damaged"),
        (lambda content: content["formats"]["int8"].append(content["formats"]["fp8"][0]), "damaged"),
        (lambda content: content["formats"]["int8"].append(DOWN.format(3)), "lists other tensors"),
        (lambda content: content["formats"]["unquantized"].insert(0, "model.norm.weight"), "lists other tensors"),
        (lambda content: content["formats"]["int8"].pop(), "lists other tensors"),
        (lambda content: content["formats"].pop("unquantized"), "lists other tensors"),
        (lambda content: content["formats"].update({"int8-zp": content["formats"].pop("int8")}), "lists other"),
        (lambda content: content.update(scheme="bf16", group_size=None), "damaged"),
        (lambda content: content.update(quantized_lm_head=False), "damaged"),
        (lambda content: content.update(method=None), "damaged"),
    ],
)
def test_a_manifest_that_cannot_be_true(
    made: Made, change: Callable[[dict], object], says: str, tmp_path: Path
) -> None:
    out = shutil.copytree(made.shards(2), tmp_path / "out")
    Shards(out)
    edit_json(out / "shards.json", change)
    with pytest.raises(InputError, match=f"shards.json (is )?{says}"):
        Shards(out)
    refuse(tmp_path, quantize, "--verify", "--out", out, says=[says])


# --- config.json, and back


def test_the_library_gives_every_module_its_scheme(made: Made) -> None:
    """By its own functions, which then decompress what the modules are said to hold to the same weights."""
    fields = json.loads((made.shards(1) / "config.json").read_text())["quantization_config"]
    described = QuantizationConfig.model_validate(fields)
    assert (described.format, described.quantization_status) == ("mixed-precision", "compressed")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made.checkpoint))
    apply_quantization_config(model, described)
    held = load_file(made.shards(1) / "chip-00-of-01.safetensors")
    expected = weights_by_hand(made.shards(1))
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        form = FORMATS.get(f"{name}.weight", "unquantized")
        assert (scheme is None) == (form == "unquantized"), name
        if scheme is None:
            continue
        each, weights = table.FORMATS[form], scheme.weights
        assert (weights.type, weights.num_bits) == ("float" if each.kind == "fp8" else "int", int(each.kind[-1]))
        assert (weights.group_size, weights.symmetric) == (each.group_size, not each.zero_points), name
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in held.items() if key.startswith(f"{name}.weight")}
        own |= {"weight_shape": torch.tensor(expected[f"{name}.weight"].shape)}
        own["weight_scale"] = own["weight_scale"].float()
        theirs = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)["weight"]
        assert torch.equal(theirs, expected[f"{name}.weight"]), name
    assert {f"{name}.weight" for name in described.ignore} == {
        name for name, form in FORMATS.items() if form == "unquantized"
    }


def test_one_layout_is_named_and_what_is_not_quantized_ignored(made: Made, tmp_path: Path) -> None:
    """Groups of two sizes are one layout; int8 beside what isn't quantized is as the library's own int8."""
    sizes = {name: "int4-g64" if "down" in name else "int4-g32" for name in FORMATS}
    fields = json.loads((shard(made.checkpoint, tmp_path / "sizes", 1, sizes) / "config.json").read_text())
    assert fields["quantization_config"]["format"] == "pack-quantized"
    assert len(fields["quantization_config"]["config_groups"]) == 2
    some = {name: "int8" if "layers.1" in name else "unquantized" for name in FORMATS}
    out = shard(made.checkpoint, tmp_path / "some", 3, some)
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    assert described["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert set(described["ignore"]) == {name.removesuffix(".weight") for name in FORMATS if "layers.1" not in name}
    invoke(convert, "--source", out, "--keep-int8", "--dtype", "float32", "--out", tmp_path / "kept")
    kept = stored(tmp_path / "kept")
    assert kept.keys() == load_file(out / "chip-00-of-03.safetensors").keys()
    invoke(convert, "--source", tmp_path / "kept", "--dtype", "float32", "--out", tmp_path / "again")
    invoke(convert, "--source", out, "--dtype", "float32", "--out", tmp_path / "restored")
    again, restored = stored(tmp_path / "again"), stored(tmp_path / "restored")
    assert all(torch.equal(again[name], tensor) for name, tensor in restored.items())


@pytest.mark.parametrize("chips", [1, 3, 8])
def test_the_way_back(made: Made, chips: int, tmp_path: Path) -> None:
    """Dequantized, bit for bit what is decoded by hand."""
    invoke(convert, "--source", made.shards(chips), "--dtype", "float32", "--out", tmp_path / "restored")
    expected, found = weights_by_hand(made.shards(1)), stored(tmp_path / "restored")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "quantization_config" not in json.loads((tmp_path / "restored" / "config.json").read_text())
    says = ["--keep-int8 is for"]
    refuse(tmp_path, convert, "--source", made.shards(chips), "--keep-int8", "--out", tmp_path / "int8", says=says)
