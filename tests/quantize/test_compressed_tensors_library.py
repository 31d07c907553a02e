"""What files hold of quantized weights, as the compressed-tensors library reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import quantized_names
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from invoke import invoke
from models import make_model, make_opt
from safetensors.torch import load_file

from quantize.cli import command as quantize
from quantize.formats.table import FORMATS
from quantize.shards.reading import Shards

NAMES = [name for name, each in FORMATS.items() if each.quantizes and not name.endswith("-f16")]  # by options
LAYOUTS = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
# The widths of GROUPED are multiples of 128; those of ODD, and its numbers of rows, of 2 at most.
GROUPED = {"heads": 8, "kv_heads": 2, "head_dim": 48, "hidden": 128, "layers": 1, "ffn": 256, "vocab": 99}
ODD = {"heads": 3, "kv_heads": 1, "head_dim": 14, "hidden": 45, "layers": 1, "ffn": 171, "vocab": 99}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    make_model(root / "grouped", **GROUPED)
    make_model(root / "odd", **ODD)
    make_opt(root / "opt", hidden=64, ffn=128, width=32)
    return root


def shards_of(models: Path, name: str, out: Path, *options: object) -> Path:
    """One chip's shards of the model that goes with a format."""
    each = FORMATS[name]
    flags = [f"--{each.kind}", "--group-size", each.group_size or "channel", *options]
    flags += ["--zero-points"] if each.zero_points else []
    invoke(quantize, models / ("grouped" if each.group_size else "odd"), *flags, "--out", out)
    return out


def described(directory: Path) -> QuantizationConfig:
    """The library's reading of config.json."""
    return QuantizationConfig.model_validate(json.loads((directory / "config.json").read_text())["quantization_config"])


def of_module(tensors: dict[str, torch.Tensor], name: str, shape: torch.Size) -> dict[str, Any]:
    """The tensors of a linear by the names that its module has for them, and the weight's shape."""
    prefix = name.removesuffix("weight")
    found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return found | {"weight_shape": torch.tensor(shape)}


@pytest.mark.parametrize("name", NAMES)
def test_the_library_decompresses_the_same_weights(models: Path, name: str, tmp_path: Path) -> None:
    """In the scales' dtype, and so in bfloat16, bit for bit; and by float32 scales, bit for bit in float32."""
    shards = Shards(shards_of(models, name, tmp_path / "out", "--quantize-lm-head"))
    tensors = load_file(tmp_path / "out" / "chip-00-of-01.safetensors")
    scheme = described(tmp_path / "out").config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    names = quantized_names(tensors)
    assert len(names) == 8
    for weight in names:
        shape = shards.parameters[weight].parameter.shape
        ours = shards.dequantized(weight, 0, shape[0])
        held = of_module(tensors, weight, shape)
        theirs = compressor.decompress(held, scheme)["weight"]
        assert theirs.dtype == held["weight_scale"].dtype
        assert torch.equal(theirs.bfloat16().view(torch.int16), ours.bfloat16().view(torch.int16)), weight
        exact = held | {"weight_scale": held["weight_scale"].float()}
        assert torch.equal(compressor.decompress(exact, scheme)["weight"], ours), weight


@pytest.mark.parametrize("name", NAMES)
def test_the_library_compresses_to_the_same_bits(models: Path, name: str, tmp_path: Path) -> None:
    """Values, packed or not, and zero points, from the dequantized weights and our scales."""
    shards = Shards(shards_of(models, name, tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "chip-00-of-01.safetensors")
    scheme = described(tmp_path / "out").config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    for weight in quantized_names(tensors):
        shape = shards.parameters[weight].parameter.shape
        held = of_module(tensors, weight, shape)
        exact = {"weight": shards.dequantized(weight, 0, shape[0]), "weight_scale": held["weight_scale"].float()}
        if FORMATS[name].zero_points:
            exact["weight_zero_point"] = shards.rows(f"{weight}_zero_point", 0, shape[0])
        again = compressor.compress(exact, scheme)
        stored = [key for key in held if key not in ("weight_scale", "weight_shape")]
        assert stored == [f"weight{part.suffix}" for part in FORMATS[name].parts if part.suffix != "_scale"]
        for key in stored:
            assert again[key].dtype == held[key].dtype
            bits = torch.uint8 if held[key].itemsize == 1 else held[key].dtype
            assert torch.equal(again[key].view(bits), held[key].view(bits)), (weight, key)


@pytest.mark.parametrize("name", NAMES)
def test_the_library_reads_the_description(models: Path, name: str, tmp_path: Path) -> None:
    each = FORMATS[name]
    found = described(shards_of(models, name, tmp_path / "out"))
    assert found.format == LAYOUTS[each.kind]
    assert found.quantization_status == "compressed"
    assert found.ignore == ["lm_head"]
    assert list(found.config_groups) == ["group_0"]
    scheme = found.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    assert (scheme.targets, scheme.format) == (["Linear"], LAYOUTS[each.kind])
    assert scheme.input_activations is scheme.output_activations is None
    weights = scheme.weights
    assert (weights.num_bits, weights.type) == (
        4 if each.kind == "int4" else 8,
        "float" if each.kind == "fp8" else "int",
    )
    assert (weights.strategy, weights.group_size) == ("group" if each.group_size else "channel", each.group_size)
    assert (weights.symmetric, weights.dynamic) == (not each.zero_points, False)


@pytest.mark.parametrize("flags", [["--int4"], ["--fp8"], ["--int8", "--zero-points"]], ids=str)
def test_linears_of_opt_that_stay_as_they_are_are_ignored(models: Path, flags: list[str], tmp_path: Path) -> None:
    invoke(quantize, models / "opt", *flags, "--out", tmp_path / "out")
    ignored = ["lm_head", "model.decoder.project_in", "model.decoder.project_out"]
    assert described(tmp_path / "out").ignore == ignored
    tensors = load_file(tmp_path / "out" / "chip-00-of-01.safetensors")
    assert not {f"{name}.weight" for name in ignored} & set(quantized_names(tensors))
    assert len(quantized_names(tensors)) == 12
