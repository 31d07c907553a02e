"""fp8 as DeepSeek and Qwen publish it, written by its description: scales of blocks that values are multiplied by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import e4m3_values
from invoke import invoke, notes, refuse_source
from models import stored
from quantized import DOWN, KEY, Stored, change_settings, change_tensors, write_quantized

from converters.cli import command as convert
from quantize.cli import command as quantize

BLOCK = [128, 128]
SIZES = {
    "hidden": 160,
    "ffn": 200,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 36,
}  # no block divides any, but by 128 and 32


def described(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": BLOCK} | fields


def blocks(name: str, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> Stored:
    """Every block of 128 x 128 has a scale, and those at the edges as well."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128))
    tiles = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scale = (tiles.abs().amax((1, 3)) / 448).to(dtype)
    whole = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    values = (weight / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
    exact = torch.from_numpy(e4m3_values()[values.view(torch.uint8).numpy()]) * whole.double()
    return {"weight": values, "weight_scale_inv": scale}, exact.float()


def whole(name: str, weight: torch.Tensor, suffix: str = "weight_scale") -> Stored:
    scale = weight.abs().amax().view(1) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, suffix: scale}, values.float() * scale


def assert_converts(root: Path, expected: dict[str, torch.Tensor], *said: str) -> None:
    found = notes(invoke(convert, "--source", root / "hf", "--out", root / "plain", "--dtype", "float32"))
    assert len(found) == len(said) + 1
    for words, line in zip(("activations in fp8 too", *said), found, strict=True):
        assert words in line
    got = stored(root / "plain")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks(dtype: torch.dtype, tmp_path: Path) -> None:
    encode = lambda name, weight: blocks(name, weight, dtype)  # noqa: E731
    assert_converts(tmp_path, write_quantized(tmp_path / "hf", described(), encode, **SIZES))


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
def test_one_scale_for_the_tensor(suffix: str, tmp_path: Path) -> None:
    settings = described(
        weight_block_size=None, activation_scheme="static", modules_to_not_convert=["lm_head", "k_proj"]
    )
    plain = ["lm_head.weight", KEY, KEY.replace("0", "1", 1)]
    expected = write_quantized(tmp_path / "hf", settings, lambda name, weight: whole(name, weight, suffix), plain)
    scale = f"{DOWN.removesuffix('weight')}input_scale"
    change_tensors(tmp_path / "hf", lambda tensors: tensors.update({scale: torch.ones(())}))
    assert_converts(tmp_path, expected, "scales of activations, which are not quantized here")


def test_a_linear_that_is_not_quantized_is_said(tmp_path: Path) -> None:
    expected = write_quantized(tmp_path / "hf", described(), blocks, ["lm_head.weight", KEY])
    assert_converts(tmp_path, expected, f"{KEY} is not quantized, though config.json doesn't have it in modules_to_not")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"weight_block_size": [128]}, "weight_block_size [128]"),
        ({"weight_block_size": "128x128"}, "weight_block_size '128x128'"),
        ({"weight_block_size": [64, 128]}, "config.json calls for"),
        ({"activation_scheme": "block"}, "activation_scheme 'block'"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert 'lm_head'"),
        ({"rotation": "hadamard"}, "rotation 'hadamard'"),
        ({"weight_block_size": None}, "config.json calls for [1]"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", described(), blocks, layers=1, **SIZES)
    change_settings(tmp_path / "hf", **fields)
    refuse_source(tmp_path, says)


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", described(), blocks, layers=1)
    inverse = f"{DOWN}_scale_inv"
    change_tensors(tmp_path / "hf", lambda tensors: tensors.update({f"{DOWN}_scale": tensors[inverse].clone()}))
    refuse_source(tmp_path, f"{DOWN}_scale is none that")
    change_tensors(tmp_path / "hf", lambda tensors: tensors.pop(inverse))
    refuse_source(tmp_path, f"{DOWN}_scale is none that")
    change_tensors(tmp_path / "hf", lambda tensors: tensors.pop(f"{DOWN}_scale"))
    refuse_source(tmp_path, f"{DOWN} is of type float8_e4m3fn; this tool reads")


def test_blocks_of_scales_that_bfloat16_holds_are_kept(tmp_path: Path) -> None:
    """As groups of 128, each block's scale once for every output; others are not, and it is said why."""
    encode = lambda name, weight: blocks(name, weight, torch.bfloat16)  # noqa: E731
    expected = write_quantized(tmp_path / "hf", described(), encode, hidden=128, ffn=256)
    held = stored(tmp_path / "hf")
    said = notes(invoke(quantize, tmp_path / "hf", "--keep", "--out", tmp_path / "out"))
    got = stored(tmp_path / "out")
    for name in expected:
        if f"{name}_scale_inv" in held:
            assert torch.equal(got[name].view(torch.uint8), held[name].view(torch.uint8))
            scale = held[f"{name}_scale_inv"].repeat_interleave(128, 0)[: len(held[name])]
            groups = got[f"{name}_scale"]  # where a row is one block, float32 of the whole row
            assert torch.equal(groups.float(), scale.float())
    assert any("fp8-g128 values and scales are kept" in line for line in said)
    invoke(convert, "--source", tmp_path / "out", "--out", tmp_path / "back", "--dtype", "float32")
    back = stored(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())
    write_quantized(tmp_path / "exact", described(), blocks, hidden=256, ffn=256, head_dim=64)
    refuse_line = invoke(quantize, tmp_path / "exact", "--keep", "--out", tmp_path / "not", exit_code=2).stderr
    assert "neither bfloat16 nor float16 holds its scales" in refuse_line
