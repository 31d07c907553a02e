"""The layouts of compressed-tensors, as the library itself writes and reads them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from compressed import LAYOUTS, by_the_library, described, float4_values
from invoke import invoke, notes, refuse_source
from models import edit_json, stored
from quantized import DOWN, HEAD, KEY, Stored, change_settings, change_tensors, write_quantized

from converters.cli import command as convert
from quantize.cli import command as quantize

# Widths that fill no word, and numbers of outputs.
ODD = {"hidden": 45, "ffn": 93, "heads": 3, "kv_heads": 1, "head_dim": 14}


def convert_floats(root: Path, source: str = "hf") -> dict[str, torch.Tensor]:
    invoke(convert, "--source", root / source, "--out", root / "plain", "--dtype", "float32")
    return stored(root / "plain")


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor.float()), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    zip((name for name in LAYOUTS if name != "mxfp4"), cycle((torch.float32, torch.bfloat16, torch.float16))),
    ids=str,
)
def test_rows_are_the_librarys(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, in blocks that begin at any row."""
    sizes = {} if "group_size" in LAYOUTS[name][1] else ODD
    expected = write_quantized(tmp_path / "hf", described((name, ["Linear"])), by_the_library(name, dtype), [], **sizes)
    change_settings(tmp_path / "hf", ignore=[])
    assert_same(convert_floats(tmp_path), expected)


def test_mxfp4_by_hand(tmp_path: Path) -> None:
    """The library doesn't decompress it: powers of two by their exponents, groups of 32."""

    def encode(_: str, weight: torch.Tensor) -> Stored:
        (out, inputs), generator = weight.shape, torch.Generator().manual_seed(weight.shape[0])
        packed = torch.randint(0, 256, (out, inputs // 2), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(90, 160, (out, inputs // 32), generator=generator)
        scale = torch.pow(2.0, exponents.double() - 127).repeat_interleave(32, 1)
        exact = (float4_values(packed) * scale).float()
        return {"weight_packed": packed, "weight_scale": exponents.to(torch.uint8)}, exact

    expected = write_quantized(tmp_path / "hf", described(("mxfp4", ["Linear"])), encode)
    assert_same(convert_floats(tmp_path), expected)
    change_tensors(tmp_path / "hf", lambda tensors: tensors[f"{DOWN}_scale"][3].fill_(255))
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "again", exit_code=2).stderr
    assert f"{DOWN}_scale holds NaN" in said


# --- groups of linears


def test_several_groups_and_ignored_linears(tmp_path: Path) -> None:
    """A name counts before a pattern, and that before a class; the order of groups does not."""
    layouts = {"int8": ["Linear"], "packed4-g32-zp": ["re:.*mlp.*"], "fp8": [DOWN.removesuffix(".weight")]}
    encoders = {name: by_the_library(name, torch.bfloat16) for name in layouts}

    def encode(name: str, weight: torch.Tensor) -> Stored:
        layout = "fp8" if name == DOWN else "packed4-g32-zp" if "mlp" in name else "int8"
        return encoders[layout](name, weight)

    plain = [HEAD, KEY]
    for order in (list(layouts.items()), list(layouts.items())[::-1]):
        source = tmp_path / order[0][0]
        expected = write_quantized(source, described(*order), encode, plain)
        change_settings(source, ignore=["lm_head", "re:.*layers.0.self_attn.k_.*"])
        said = notes(invoke(convert, "--source", source, "--out", source / "plain", "--dtype", "float32"))
        assert said == []
        assert_same(stored(source / "plain"), expected)


def test_a_linear_that_no_group_is_for(tmp_path: Path) -> None:
    settings = described(("int8", ["re:.*mlp.*"]), ("int8", ["re:.*self_attn.[qkv]_proj"]))
    write_quantized(tmp_path / "hf", settings, by_the_library("int8", torch.float32))
    refuse_source(tmp_path, "self_attn.o_proj is quantized, but no config group")


def test_activations_that_are_stored_are_left_out_with_a_note(tmp_path: Path) -> None:
    expected = write_quantized(tmp_path / "hf", described(("fp8", ["Linear"])), by_the_library("fp8", torch.float32))
    module = DOWN.removesuffix(".weight")
    change_tensors(tmp_path / "hf", lambda tensors: tensors.update({f"{module}.input_scale": torch.ones(1)}))
    said = notes(invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "plain", "--dtype", "float32"))
    assert said == [f"1 tensor left out: scales of activations, which are not quantized here ({module}.input_scale)."]
    assert_same(stored(tmp_path / "plain"), expected)


@pytest.mark.parametrize("name", ["int8", "packed4-g32-zp"])
def test_a_tied_model_with_a_quantized_head_of_its_own(name: str, tmp_path: Path) -> None:
    """As with a head that is stored as it is: both count."""
    encode = by_the_library(name, torch.float32)
    expected = write_quantized(tmp_path / "hf", described((name, ["Linear"])), encode, [])
    change_settings(tmp_path / "hf", ignore=[])
    edit_json(tmp_path / "hf" / "config.json", lambda content: content.update(tie_word_embeddings=True))
    said = notes(invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "plain", "--dtype", "float32"))
    assert any("tie_word_embeddings is false" in line for line in said)
    assert_same(stored(tmp_path / "plain"), expected)


# --- what doesn't go together


def _packed_along_outputs(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}_packed"] = tensors[f"{DOWN}_packed"].T.contiguous()


def _another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}_shape"] = torch.tensor([64, 95])


def _uneven_groups(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}_g_idx"][tensors[f"{DOWN}_g_idx"] == 1] = 2


def _without(part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(f"{DOWN}_{part}")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("packed4-g32-zp", _packed_along_outputs, "shape [12, 64], but config.json calls for [64, 12]"),
        ("packed4-g32-zp", _another_shape, "shape [64, 95] by its weight_shape"),
        ("packed4-g32-zp", _without("zero_point"), "calls for the tensor weight_zero_point"),
        ("packed4-g32-zp", _without("packed"), "calls for the tensor weight_packed"),
        ("packed4-g32-zp", _without("shape"), "calls for the tensor weight_shape"),
        ("packed4-g32-order", _without("g_idx"), "calls for the tensor weight_g_idx"),
        ("packed4-g32-order", _uneven_groups, "doesn't give every group 32 inputs"),
        ("fp8-blocks", _without("scale"), f"{DOWN} is of type float8_e4m3fn"),
    ],
)
def test_tensors_that_are_not_what_config_json_says(
    name: str, change: Callable[[dict[str, torch.Tensor]], object], says: str, tmp_path: Path
) -> None:
    write_quantized(tmp_path / "hf", described((name, ["Linear"])), by_the_library(name, torch.float32))
    change_tensors(tmp_path / "hf", change)
    refuse_source(tmp_path, says)


@pytest.mark.parametrize(
    ("stored_as", "said", "says"),
    [
        ("packed4-g32", "packed4-g32-zp", "calls for the tensor weight_zero_point"),
        ("packed4-g32-zp", "packed4-g32", "weight_zero_point is none that"),
        ("packed4-g32-order", "packed4-g32-zp", "weight_g_idx is none that"),
        ("packed4-g32", "packed4", "weight_scale is of shape"),
        ("packed4-g32", "packed8-g32-zp", "weight_packed is of shape"),
        ("int8", "packed4", "calls for the tensor weight_packed"),
        ("int8", "fp8", "is of type int8; config.json calls for float8_e4m3fn"),
        ("fp8", "int8", "is of type float8_e4m3fn; config.json calls for int8"),
        ("nvfp4", "packed4-g32", "weight_packed is of shape"),
        ("packed4-g32", "nvfp4", "weight_shape is none that"),
    ],
)
def test_a_config_json_of_another_layout(stored_as: str, said: str, says: str, tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", described((said, ["Linear"])), by_the_library(stored_as, torch.float32))
    refuse_source(tmp_path, says)


@pytest.mark.parametrize("pattern", [0x7F, 0xFF])
def test_fp8_that_stands_for_no_number(pattern: int, tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", described(("fp8", ["Linear"])), by_the_library("fp8", torch.float32))
    change_tensors(tmp_path / "hf", lambda tensors: tensors[DOWN].view(torch.uint8)[5, 7:8].fill_(pattern))
    for command, *arguments in ((convert, "--source"), (quantize, "--keep"), (quantize, "--int8")):
        said = invoke(command, *arguments, tmp_path / "hf", "--out", tmp_path / arguments[0], exit_code=2).stderr
        assert f"the tensor {DOWN} holds NaN" in said


def test_int8_that_is_said_to_be_of_4_bits(tmp_path: Path) -> None:
    write_quantized(
        tmp_path / "hf", described(("int4-in-int8-g32", ["Linear"])), by_the_library("int8-g32", torch.float32)
    )
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "plain", exit_code=2).stderr
    assert "no integers of 4 bits" in said
