"""Checkpoints of bitsandbytes, written by the format's description: int8, nf4 and fp4, once and twice quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke, notes, refuse, refuse_source
from models import stored
from quantized import DOWN, Encode, Stored, change_settings, change_tensors, write_quantized

from converters.cli import command as convert
from quantize.cli import command as quantize

ODD = {"hidden": 45, "ffn": 93, "heads": 3, "kv_heads": 1, "head_dim": 14}  # rows begin within bytes and blocks
NORMAL = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.05, 0.95, 16)).float()
TABLE = (NORMAL / NORMAL.abs().amax()).sort().values  # any 16 numbers: the file has them
STATE = "weight.quant_state.bitsandbytes__"


def settings_4(kind: str = "nf4", **fields: Any) -> dict[str, Any]:
    """A quantization_config as transformers writes it."""
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
        "_load_in_8bit": False, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_use_double_quant": True, "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"], "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    } | fields  # fmt: skip


def settings_8(**fields: Any) -> dict[str, Any]:
    return settings_4() | {"load_in_4bit": False, "load_in_8bit": True} | fields


def in_4_bits(kind: str = "nf4", double: bool = True, size: int = 64) -> Encode:
    def encode(_: str, weight: torch.Tensor) -> Stored:
        flat = weight.flatten().double()
        blocks = torch.arange(len(flat)) // size
        largest = torch.zeros(int(blocks[-1]) + 1).double().scatter_reduce(0, blocks, flat.abs(), "amax").float()
        state = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": list(weight.shape)}
        tensors = {"weight.absmax": largest}
        if double:
            tensors, largest = _nested(largest)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        scaled = flat.float() / largest[blocks]
        codes = (scaled[:, None] - TABLE).abs().argmin(1)
        pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
        tensors["weight"] = (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None]
        tensors["weight.quant_map"] = TABLE.clone()
        tensors[STATE + kind] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        exact = TABLE[codes].double() * largest[blocks].double()
        return tensors, exact.float().view_as(weight)

    return encode


def _nested(largest: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Magnitudes in codes of 8 bits; and what these stand for, of a table of 256 numbers that has no pattern."""
    table = torch.linspace(-1, 1, 256)
    blocks = torch.arange(len(largest)) // 256
    outer = torch.ones(int(blocks[-1]) + 1) * 3.7
    codes = ((largest - 0.25)[:, None] / outer[blocks][:, None] - table).abs().argmin(1)
    found = table[codes] * outer[blocks] + 0.25
    held = {"weight.absmax": codes.to(torch.uint8), "weight.nested_absmax": outer, "weight.nested_quant_map": table}
    return held, found


def in_8_bits(_: str, weight: torch.Tensor) -> Stored:
    largest = weight.abs().amax(1)
    values = (weight / largest[:, None] * 127).round().to(torch.int8)
    tensors = {"weight": values, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, values.float() * largest[:, None] * 7.874015718698502e-3


def assert_converts(root: Path, expected: dict[str, torch.Tensor]) -> None:
    assert notes(invoke(convert, "--source", root / "hf", "--out", root / "plain", "--dtype", "float32")) == []
    got = stored(root / "plain")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("kind", "double", "size"), [("nf4", True, 64), ("fp4", False, 64), ("nf4", True, 128)])
def test_4_bits(kind: str, double: bool, size: int, tmp_path: Path) -> None:
    expected = write_quantized(tmp_path / "hf", settings_4(kind), in_4_bits(kind, double, size), **ODD)
    assert_converts(tmp_path, expected)


def test_int8(tmp_path: Path) -> None:
    assert_converts(tmp_path, write_quantized(tmp_path / "hf", settings_8(), in_8_bits, **ODD))


def test_rows_that_begin_anywhere(tmp_path: Path) -> None:
    """On three chips, whose rows begin within a byte and a block."""
    expected = write_quantized(tmp_path / "hf", settings_4(), in_4_bits(), **ODD)
    invoke(quantize, tmp_path / "hf", "--int8", "--chips", 3, "--out", tmp_path / "out")
    invoke(convert, "--source", tmp_path / "out", "--out", tmp_path / "back", "--dtype", "float32")
    got, scale = stored(tmp_path / "back")[DOWN], expected[DOWN].abs().amax(1, keepdim=True) / 127
    assert ((got - expected[DOWN]).abs() <= scale * 0.501).all()


@pytest.mark.parametrize(("settings", "encode"), [(settings_4(), in_4_bits()), (settings_8(), in_8_bits)])
def test_nothing_is_kept_and_a_second_rounding_is_said(
    settings: dict[str, Any], encode: Encode, tmp_path: Path
) -> None:
    write_quantized(tmp_path / "hf", settings, encode, layers=1)
    line = refuse(tmp_path, quantize, tmp_path / "hf", "--keep", "--out", tmp_path / "out")
    assert "nothing that" in line
    said = notes(invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "out"))
    assert "A second rounding, from the source's bitsandbytes, " in said[-1]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4'"),
        ({"bnb_4bit_quant_type": "fp4"}, "calls for the tensor weight.quant_state.bitsandbytes__fp4"),
        ({"load_in_8bit": True}, "load_in_4bit True and load_in_8bit True"),
        ({"load_in_4bit": False}, "load_in_4bit False and load_in_8bit False"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "is none that config.json's quantization_config calls for"),
        ({"rotation": 1}, "rotation 1"),
        ({"quant_method": "awq"}, "load_in_4bit True"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", settings_4(), in_4_bits(), layers=1)
    change_settings(tmp_path / "hf", **fields)
    refuse_source(tmp_path, says)


def _state(**fields: Any) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{DOWN.removesuffix('weight')}{STATE}nf4"
        content = json.loads(bytes(tensors[name].tolist())) | fields
        tensors[name] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_state(shape=[96, 64]), "of shape [96, 64]"),
        (_state(quant_type="fp4"), "says 'fp4'"),
        (_state(blocksize=0), "doesn't describe a weight"),
        (_state(blocksize=32), "weight.absmax is of shape"),
        (_state(nested_offset="x"), "doesn't describe a weight"),
        (lambda tensors: tensors[f"{DOWN}.quant_state.bitsandbytes__nf4"].fill_(0), "doesn't describe a weight"),
        (lambda tensors: tensors.pop(f"{DOWN}.nested_absmax"), "calls for the tensor weight.nested_absmax"),
        (lambda tensors: tensors.update({f"{DOWN}.absmax": torch.ones(96)}), "absmax is of type float32"),
    ],
)
def test_tensors_that_are_refused(change: Any, says: str, tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", settings_4(), in_4_bits(), layers=1)
    change_tensors(tmp_path / "hf", change)
    refuse_source(tmp_path, says)


def test_values_in_the_order_of_tiles(tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", settings_8(), in_8_bits, layers=1)
    name = f"{DOWN.removesuffix('weight')}weight_format"
    change_tensors(tmp_path / "hf", lambda tensors: tensors[name].fill_(2))
    refuse_source(tmp_path, "in the order of a GPU's tiles")
