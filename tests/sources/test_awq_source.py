"""AWQ checkpoints of the version "gemm", written by the format's description, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_awq import awq_of, awq_settings, gptq_of
from invoke import invoke, notes, refuse_source
from models import stored
from quantized import DOWN, KEY, Stored, change_settings, change_tensors, write_quantized

from converters.cli import command as convert

MODULE = DOWN.removesuffix("weight")


def assert_converts(root: Path, expected: dict[str, torch.Tensor]) -> None:
    assert notes(invoke(convert, "--source", root / "hf", "--out", root / "plain", "--dtype", "float32")) == []
    got = stored(root / "plain")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("group", "dtype"), [(32, torch.float16), (16, torch.bfloat16), (-1, torch.float16)], ids=str)
def test_rows_are_those_by_hand(group: int, dtype: torch.dtype, tmp_path: Path) -> None:
    encode = lambda _, weight: awq_of(weight, group, dtype)  # noqa: E731
    assert_converts(tmp_path, write_quantized(tmp_path / "hf", awq_settings(group_size=group), encode))


def test_every_output_has_its_place(tmp_path: Path) -> None:
    """Output k of eight holds k everywhere."""

    def encode(_: str, weight: torch.Tensor) -> Stored:
        out, inputs = weight.shape
        word = sum(output << 4 * place for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
        word -= 2**32 if word >= 2**31 else 0
        tensors = {
            "qweight": torch.full((inputs, out // 8), word, dtype=torch.int32),
            "qzeros": torch.zeros(inputs // 32, out // 8, dtype=torch.int32),
            "scales": torch.ones(inputs // 32, out, dtype=torch.float16),
        }
        return tensors, (torch.arange(out) % 8).float()[:, None].expand(out, inputs)

    assert_converts(tmp_path, write_quantized(tmp_path / "hf", awq_settings(), encode))


def test_linears_that_are_left(tmp_path: Path) -> None:
    settings = awq_settings(modules_to_not_convert=["k_proj", "mlp.down_proj"])
    plain = ["lm_head.weight", *(name.replace(".0.", f".{layer}.") for name in (KEY, DOWN) for layer in range(2))]
    assert_converts(tmp_path, write_quantized(tmp_path / "hf", settings, lambda _, weight: awq_of(weight), plain))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"version": "gemv"}, "version 'gemv'"),
        ({"version": "gemv_fast"}, "version 'gemv_fast'"),
        ({"version": "marlin"}, "version 'marlin'"),
        ({"version": "exllama"}, "version 'exllama'"),
        ({"bits": 8}, "bits 8"),
        ({"zero_point": False}, "zero_point False"),
        ({"group_size": 24}, "24 inputs to a group"),
        ({"group_size": 64}, "qzeros is of shape [2, 8], but config.json calls for [1, 8]"),
        ({"group_size": None}, "group_size None"),
        ({"quant_method": "gptq", "desc_act": False}, "zero_point True"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert 'lm_head'"),
        ({"transform": "rotation"}, "transform 'rotation'"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", awq_settings(), lambda _, weight: awq_of(weight), layers=1)
    change_settings(tmp_path / "hf", **fields)
    refuse_source(tmp_path, says)


def _gptq(tensors: dict[str, torch.Tensor]) -> None:
    held, _ = gptq_of(torch.randn(64, 96))
    tensors.update({f"{MODULE}{part}": value.contiguous() for part, value in held.items() if part != "g_idx"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_gptq, "qweight is of shape [12, 64], but config.json calls for [96, 8]"),
        (
            lambda tensors: tensors.update({f"{MODULE}g_idx": torch.arange(96).int()}),
            "it is one of those of GPTQ, and config",
        ),
        (lambda tensors: tensors.pop(f"{MODULE}scales"), "calls for the tensor scales"),
    ],
)
def test_tensors_that_are_refused(change: Any, says: str, tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", awq_settings(), lambda _, weight: awq_of(weight), layers=1)
    change_tensors(tmp_path / "hf", change)
    refuse_source(tmp_path, says)
