"""Every weight format end to end: what files hold, decoded by the tests' own lines; chip counts against each other."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import decoded, e4m3_values, quantized_names, stored_values
from invoke import invoke
from models import edit_json, make_model
from safetensors import safe_open
from safetensors.torch import load_file

from converters.cli import command as convert
from converters.console.errors import InputError
from converters.sources.codes import Coding
from quantize.cli import command as quantize
from quantize.formats.table import FORMATS, format_of
from quantize.formats.weight_format import WeightFormat
from quantize.shards.reading import Shards
from quantize.shards.stored import Scheme, padding_bytes

CHIP_COUNTS = (1, 2, 3, 4, 8, 16)
NAMES = [name for name, each in FORMATS.items() if each.quantizes and not name.endswith("-f16")]  # by options
QUICK = ("int8-g64-zp", "int4-zp", "int4-g128", "int4-g32-zp", "fp8", "fp8-g32")  # every way to store something once
EACH_FORMAT = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
# Groups lie on two heads, and on two chips; 515 rows of lm_head leave words of zero points that are not full.
IN_GROUPS = {"heads": 8, "kv_heads": 2, "head_dim": 48, "hidden": 128, "layers": 1, "ffn": 640, "vocab": 515}
# Rows of 45, 42 and 171 inputs fill no words.
BY_CHANNEL = {"heads": 3, "kv_heads": 1, "head_dim": 14, "hidden": 45, "layers": 2, "ffn": 171, "vocab": 131}


def test_a_coding_has_the_name_of_its_format() -> None:
    """The one that shards are exported by, and a source's that is kept."""
    for name, each in FORMATS.items():
        if each.quantizes:
            coding = Coding(each.kind, each.group_size, each.zero_points, each.parts[1].dtype)
            assert (coding.name, format_of(coding)) == (name, each)
            assert coding.bits == (4 if each.kind == "int4" else 8)


def flags_of(name: str) -> list[str]:
    """The options that ask for a format of the table."""
    each = FORMATS[name]
    head = [] if each.group_size is None else ["--quantize-lm-head"]
    zero_points = ["--zero-points"] if each.zero_points else []
    return [f"--{each.kind}", "--group-size", str(each.group_size or "channel"), *zero_points, *head]


class Made:
    """Checkpoints and their shards, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def checkpoint(self, name: str) -> Path:
        """In bfloat16, for a format of this name."""
        grouped = FORMATS[name].group_size is not None
        folder = self.root / ("in-groups" if grouped else "by-channel")
        if not folder.exists():
            make_model(folder / "hf", **(IN_GROUPS if grouped else BY_CHANNEL), tied=not grouped)
            invoke(convert, "--source", folder / "hf", "--out", folder / "checkpoint")
        return folder / "checkpoint"

    def shards(self, name: str, chips: int, method: str = "scale") -> Path:
        out = self.root / f"{name}-{method}-{chips}"
        if not out.exists():
            options = (*flags_of(name), "--chips", chips, "--method", method)
            invoke(quantize, self.checkpoint(name), *options, "--out", out)
        return out

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.checkpoint(name) / "model-00001-of-00001.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("formats"))


def chip_files(directory: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(directory.glob("chip-*.safetensors"))]


def digest(directory: Path) -> str:
    """Of every tensor put back together, values, scales and zero points."""
    shards = Shards(directory)
    found = hashlib.sha256()
    for name, stored in shards.tensors.items():
        whole = shards.rows(name, 0, stored.shape[0])
        assert (tuple(whole.shape), whole.dtype) == (stored.shape, stored.torch_dtype)
        found.update(name.encode() + whole.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def file_digests(directory: Path) -> dict[str, str]:
    """By name, but for the record of the run, which knows its source."""
    files = (path for path in directory.iterdir() if path.name != ".written.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def quantized_of(made: Made, name: str, method: str = "scale") -> Iterator[tuple[str, np.ndarray, dict, np.ndarray]]:
    """By weight: its name, its values in the checkpoint, what one chip's file stores of it, and that decoded."""
    weights = made.weights(name)
    (tensors,) = chip_files(made.shards(name, 1, method))
    names = quantized_names(tensors)
    layers = 1 if FORMATS[name].group_size else 2
    assert len(names) == 7 * layers + ("--quantize-lm-head" in flags_of(name))
    for each in names:
        weight = weights[each].double().numpy()
        width = weight.shape[1]
        yield each, weight, stored_values(tensors, each, width), decoded(tensors, each, width)


# --- one chip's file


@EACH_FORMAT
def test_one_chip_decoded_by_hand_is_what_shards_give(made: Made, name: str) -> None:
    """Bit for bit, in any blocks of rows; what is not quantized is the checkpoint's."""
    shards, weights = Shards(made.shards(name, 1)), made.weights(name)
    (tensors,) = chip_files(shards.directory)
    for parameter, weight in weights.items():
        rows = len(weight)
        found = shards.dequantized(parameter, 0, rows)
        if parameter not in quantized_names(tensors):
            assert torch.equal(tensors[parameter], weight)
            assert torch.equal(found, weight)
            continue
        expected = decoded(tensors, parameter, weight.shape[1])
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))
        for start, stop in ((0, 1), (3, 4), (5, 14), (rows - 3, rows)):
            assert torch.equal(shards.dequantized(parameter, start, stop), found[start:stop])


@EACH_FORMAT
@pytest.mark.parametrize("method", ["scale", "rtn"])
def test_values_are_the_nearest_that_their_scale_has(made: Made, name: str, method: str) -> None:
    """So the error is at most half a step, but for what lies beyond the last one."""
    for weight_name, weight, stored, found in quantized_of(made, name, method):
        scale = stored["scale"]
        nearest = _nearest(FORMATS[name], weight / scale, stored.get("zero", np.zeros_like(scale))) * scale
        excess = np.abs(found - weight) - np.abs(nearest - weight)
        assert (excess <= np.abs(scale) * 1e-4).all(), weight_name


def _nearest(weight_format: WeightFormat, steps: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Of what a scale of 1 and these zero points can give, the nearest to ``steps``."""
    if weight_format.kind == "fp8":
        values = np.unique(e4m3_values()[~np.isnan(e4m3_values())])
        above = values.searchsorted(steps).clip(1, len(values) - 1)
        lower, upper = values[above - 1], values[above]
        return np.where(steps - lower < upper - steps, lower, upper)
    lowest, highest = _range(weight_format)
    return np.clip(np.rint(steps) + zero, lowest, highest) - zero


def _range(weight_format: WeightFormat) -> tuple[int, int]:
    """8 bits without zero points leave -128 unused."""
    bits = 8 if weight_format.kind == "int8" else 4
    return -(2 ** (bits - 1)) + (bits == 8 and not weight_format.zero_points), 2 ** (bits - 1) - 1


@EACH_FORMAT
def test_scales_by_the_largest_magnitude(made: Made, name: str) -> None:
    """Or by the range with zero points; as exact as their dtype, so that nothing lies far beyond the last step."""
    each = FORMATS[name]
    rounding = 2.0**-23 if each.group_size is None else 2.0**-8
    lowest, highest = (-448, 448) if each.kind == "fp8" else _range(each)
    for weight_name, weight, stored, found in quantized_of(made, name, "rtn"):
        groups = weight.reshape(len(weight), -1, each.group_size or weight.shape[1])
        if each.zero_points:
            least = most = (groups.max(2).clip(min=0) - groups.min(2).clip(max=0)) / (highest - lowest)
        else:  # 4 bits have one value more below zero than above it, and the last step may be the middle of both
            least, most = (np.abs(groups).max(2) / steps for steps in ((highest - lowest) / 2, highest))
        scale = stored["scale"][:, :: groups.shape[2]]
        assert (scale >= least * (1 - 2 * rounding)).all(), weight_name
        assert (scale <= most * (1 + 2 * rounding)).all(), weight_name
        if each.kind == "fp8":
            relative = np.abs(found - weight) <= np.maximum(np.abs(weight) * 2.0**-4, stored["scale"] * 2.0**-10) * 1.01
            assert relative.all()
        elif not each.zero_points:
            error = np.abs(found - weight) / stored["scale"]
            assert error.max() <= 0.5 + (highest + 1) * rounding


@EACH_FORMAT
def test_searching_lowers_the_error(made: Made, name: str) -> None:
    """Of 4 bits, in every weight, and never raises that of 8 by more than what rounding a scale does.

    Where a format can't search, --method changes nothing, not even shards.json.
    """
    if not FORMATS[name].searches:
        assert file_digests(made.shards(name, 1)) == file_digests(made.shards(name, 1, "rtn"))
        return
    searched, plain = quantized_of(made, name), quantized_of(made, name, "rtn")
    for (weight_name, weight, _, better), (_, _, _, worse) in zip(searched, plain, strict=True):
        ratio = ((better - weight) ** 2).sum() / ((worse - weight) ** 2).sum()
        assert ratio < (0.99 if FORMATS[name].kind == "int4" else 1.001), weight_name
    methods = [Shards(made.shards(name, 1, method)).manifest.method for method in ("scale", "rtn")]
    assert methods == ["scale", "rtn"]


# --- several chips


@EACH_FORMAT
def test_values_do_not_depend_on_chips(made: Made, name: str) -> None:
    assert len({digest(made.shards(name, chips)) for chips in CHIP_COUNTS}) == 1


@EACH_FORMAT
def test_resharding_equals_quantizing_for_that_many_chips(made: Made, name: str, tmp_path: Path) -> None:
    source = made.shards(name, 8)
    for chips in (3, 16):
        invoke(quantize, source, *flags_of(name), "--chips", chips, "--out", tmp_path / str(chips))
        source = tmp_path / str(chips)
        assert file_digests(source) == file_digests(made.shards(name, chips))


@EACH_FORMAT
@pytest.mark.parametrize("chips", CHIP_COUNTS[1:])
def test_each_chip_holds_its_part_and_zeros(made: Made, name: str, chips: int) -> None:
    """What chips' files stand for, one after the other, is the whole weight once copies and padding are left out."""
    (whole,) = chip_files(made.shards(name, 1))
    directory = made.shards(name, chips)
    entries = json.loads((directory / "shards.json").read_text())["tensors"]
    files = chip_files(directory)
    for weight_name in quantized_names(whole):
        first = entries.get(weight_name + "_packed", entries.get(weight_name))
        axis, width = first["shard_axis"], first["shape"][1]
        local_width = (width + first["padding"]) // chips if axis == 1 else width
        parts = [decoded(file, weight_name, local_width) for file in files]
        expected = decoded(whole, weight_name, width)
        # Its rows, or its columns as rows.
        held = np.concatenate(parts, axis) if axis == 0 else np.concatenate(parts, axis).T
        distinct = dict.fromkeys(row.tobytes() for row in held if row.any())
        assert list(distinct) == [row.tobytes() for row in (expected if axis == 0 else expected.T)]
        assert len(held) == first["shape"][axis] + first["padding"]
        if "k_proj" not in weight_name and "v_proj" not in weight_name:  # no chip repeats another's heads
            assert (~held.any(axis=1)).sum() == first["padding"]


@EACH_FORMAT
@pytest.mark.parametrize("chips", [1, 3, 16])
def test_files_are_what_the_manifest_says(made: Made, name: str, chips: int) -> None:
    directory, each = made.shards(name, chips), FORMATS[name]
    manifest = json.loads((directory / "shards.json").read_text())
    assert (manifest["format_version"], manifest["chips"], manifest["scheme"]) == (2, chips, each.kind)
    assert (manifest["group_size"], manifest["zero_points"]) == (each.group_size, each.zero_points)
    assert len(manifest["files"]) == chips
    for file_name, record in manifest["files"].items():
        content = (directory / file_name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        with safe_open(directory / file_name, "pt") as file:
            assert set(file.keys()) == set(manifest["tensors"])
            for tensor, entry in manifest["tensors"].items():
                local = file.get_tensor(tensor)
                assert (str(local.dtype), list(local.shape)) == _in_a_file(tensor, entry, chips), tensor


def _in_a_file(tensor: str, entry: dict, chips: int) -> tuple[str, list[int]]:
    """Dtype and shape of what each chip's file holds of a tensor, by its entry in shards.json."""
    shape = list(entry["shape"])
    axis = entry["shard_axis"]
    if axis is not None:
        padded = shape[axis] + entry["padding"]
        assert padded % chips == 0
        shape[axis] = padded // chips
    if entry["dtype"] != "int4":
        return f"torch.{entry['dtype']}", shape
    packed = 0 if tensor.endswith("_zero_point") else 1
    shape[packed] = -(-shape[packed] // 8)
    return "torch.int32", shape


@EACH_FORMAT
def test_padding_is_counted(made: Made, name: str) -> None:
    """Bytes of tensors that are split, over what one chip holds of them."""

    def split_bytes(directory: Path) -> int:
        entries = json.loads((directory / "shards.json").read_text())["tensors"]
        split = {tensor for tensor, entry in entries.items() if entry["shard_axis"] is not None}
        return sum(file[tensor].nbytes for file in chip_files(directory) for tensor in split)

    config = Shards(made.shards(name, 1)).config
    scheme = Scheme(name, "--quantize-lm-head" in flags_of(name))
    # Of what every chip holds whole nothing counts; one chip's file says which tensors those are.
    for chips in (3, 16):
        entries = json.loads((made.shards(name, chips) / "shards.json").read_text())["tensors"]
        (whole,) = chip_files(made.shards(name, 1))
        once = sum(whole[tensor].nbytes for tensor, entry in entries.items() if entry["shard_axis"] is not None)
        assert padding_bytes(config, scheme, chips) == split_bytes(made.shards(name, chips)) - once


@EACH_FORMAT
def test_verify_finds_a_changed_byte_of_any_tensor(made: Made, name: str, tmp_path: Path) -> None:
    invoke(quantize, made.checkpoint(name), *flags_of(name), "--chips", 2, "--out", tmp_path / "out", "--verify")
    path = tmp_path / "out" / "chip-01-of-02.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for tensor in [tensor for tensor in header if tensor.startswith("model.layers.0.mlp.down_proj.weight")]:
        place = 8 + length + header[tensor]["data_offsets"][1] - 1
        data[place] ^= 1
        path.write_bytes(data)
        assert path.name in invoke(quantize, "--verify", "--out", tmp_path / "out", exit_code=2).stderr
        data[place] ^= 1
    path.write_bytes(data)
    invoke(quantize, "--verify", "--out", tmp_path / "out")


# --- outputs of version 1


def _as_version_1(directory: Path) -> None:
    """Make an int8 output's shards.json one of a llama-quantize that knew int8 per channel and bf16 only."""

    def change(content: dict) -> None:
        content["format_version"] = 1
        for key in ("group_size", "zero_points", "method"):
            del content[key]

    edit_json(directory / "shards.json", change)


@pytest.mark.parametrize("recorded", [True, False])
def test_int8_outputs_of_version_1_stay_readable(made: Made, recorded: bool, tmp_path: Path) -> None:
    """Verified, found complete, re-sharded into what a new output is."""
    options = (made.checkpoint("int8"), "--int8", "--chips", 3, "--out", tmp_path / "old")
    invoke(quantize, *options)
    _as_version_1(tmp_path / "old")
    record = tmp_path / "old" / ".written.json"
    if recorded:
        content = (tmp_path / "old" / "shards.json").read_bytes()
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edit_json(record, lambda fields: fields["files"].update({"shards.json": entry}))
    else:
        record.unlink()
    assert "every digest" in invoke(quantize, "--verify", "--out", tmp_path / "old").stdout
    assert "already complete" in invoke(quantize, *options).stdout
    assert digest(tmp_path / "old") == digest(made.shards("int8", 3))
    invoke(quantize, tmp_path / "old", "--int8", "--chips", 8, "--out", tmp_path / "new")
    assert file_digests(tmp_path / "new") == file_digests(made.shards("int8", 8))


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Path:
    """Shards in int4 in groups of 32 with zero points, to be changed."""
    return shutil.copytree(made.shards("int4-g32-zp", 1), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content.update(format_version=4), "of format version 4"),
        (lambda content: content.update(format_version=True), "of format version True"),
        (lambda content: content.update(scheme="int5"), "damaged"),
        (lambda content: content.update(group_size=48), "damaged"),
        (lambda content: content.update(group_size=32.0), "damaged"),
        (lambda content: content.update(zero_points=1), "damaged"),
        (lambda content: content.update(method="best"), "damaged"),
        (lambda content: content.update(method=None), "damaged"),
        (lambda content: content.pop("method"), "damaged"),
        (lambda content: content.update(zero_points=False), "lists other tensors"),
        (lambda content: content.update(group_size=64), "lists other tensors"),
        (lambda content: content.pop("group_size"), "lists other tensors"),
        (lambda content: content.update(scheme="int8", method=None), "lists other tensors"),
    ],
)
def test_a_manifest_that_names_another_format_is_refused(
    copied: Path, change: Callable[[dict], object], says: str
) -> None:
    Shards(copied)
    edit_json(copied / "shards.json", change)
    with pytest.raises(InputError, match=f"shards.json (is )?{says}"):
        Shards(copied)


def test_a_method_is_none_where_there_is_no_choice(made: Made, tmp_path: Path) -> None:
    out = shutil.copytree(made.shards("fp8", 1), tmp_path / "out")
    edit_json(out / "shards.json", lambda content: content.update(method="rtn"))
    with pytest.raises(InputError, match=r"shards.json is damaged"):
        Shards(out)
