"""GPTQ checkpoints, written by the format's description: all bits, both versions, act-order, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_awq import awq_of, gptq_of, gptq_settings
from invoke import invoke, notes, refuse_source
from models import edit_json, stored
from quantized import DOWN, KEY, change_settings, change_tensors, write_quantized

from converters.cli import command as convert

# For 3 bits, outputs and inputs come by 32.
SIZES = {"hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16}
MODULE = DOWN.removesuffix("weight")


def shuffled(inputs: int) -> torch.Tensor:
    return torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))


def assert_converts(root: Path, expected: dict[str, torch.Tensor], *said: str) -> None:
    found = notes(invoke(convert, "--source", root / "hf", "--out", root / "plain", "--dtype", "float32"))
    assert len(found) == len(said)
    assert all(words in line for words, line in zip(said, found, strict=True))
    got = stored(root / "plain")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "group", "sym"), [(2, 32, False), (3, 32, True), (4, 40, False), (8, -1, True)])
def test_rows_are_those_by_hand(bits: int, group: int, sym: bool, version: int, tmp_path: Path) -> None:
    """Groups of 40 leave a rest of 24 and of 16 inputs."""
    settings = gptq_settings(bits=bits, group_size=group, sym=sym, checkpoint_format=f"gptq{'_v2' * (version - 1)}")
    encode = lambda _, weight: gptq_of(weight, bits, group, version=version, sym=sym)  # noqa: E731
    assert_converts(tmp_path, write_quantized(tmp_path / "hf", settings, encode, **SIZES))


@pytest.mark.parametrize("bits", [3, 4])
def test_act_order(bits: int, tmp_path: Path) -> None:
    settings = gptq_settings(bits=bits, desc_act=True, sym=True)
    encode = lambda _, weight: gptq_of(weight, bits, sym=True, order=shuffled(weight.shape[1]))  # noqa: E731
    assert_converts(tmp_path, write_quantized(tmp_path / "hf", settings, encode))


def test_a_quantized_head_and_biases_of_zeros_and_linears_that_are_not_quantized(tmp_path: Path) -> None:
    """Older files have a bias for every linear and no g_idx without act-order, and name no version."""

    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors, exact = gptq_of(weight)
        del tensors["g_idx"]
        return tensors | {"bias": torch.zeros(len(weight), dtype=torch.float16)}, exact

    settings = gptq_settings(checkpoint_format=None, lm_head=True)
    expected = write_quantized(tmp_path / "hf", settings, encode, [KEY], vocab=136)
    assert_converts(tmp_path, expected, "biases of zeros", f"{KEY} is not quantized")


def test_a_bin_file(tmp_path: Path) -> None:
    expected = write_quantized(tmp_path / "hf", gptq_settings(), lambda _, weight: gptq_of(weight))
    torch.save(stored(tmp_path / "hf"), tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert_converts(tmp_path, expected)


def test_the_versions_differ_by_one(tmp_path: Path) -> None:
    """The same file read as the other version stands for other weights: by a scale each."""
    expected = write_quantized(tmp_path / "hf", gptq_settings(), lambda _, weight: gptq_of(weight))
    change_settings(tmp_path / "hf", checkpoint_format="gptq_v2")
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "plain", "--dtype", "float32")
    scale = stored(tmp_path / "hf")[f"{MODULE}scales"].float().T.repeat_interleave(32, 1)
    assert torch.allclose(stored(tmp_path / "plain")[DOWN] - expected[DOWN], scale, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bits": 5}, "bits 5"),
        ({"bits": True}, "bits True"),
        ({"bits": 8}, "qweight is of shape"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 64}, "qzeros is of shape"),
        ({"group_size": None}, "group_size None"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas'"),
        ({"format": "gptq_v2"}, "checkpoint_format 'gptq' and format 'gptq_v2'"),
        ({"pack_dtype": "int8"}, "pack_dtype 'int8'"),
        ({"dynamic": {"-:.*k_proj": {}}}, "dynamic {"),
        ({"is_marlin_format": True}, "is_marlin_format True"),
        ({"rotation": "hadamard"}, "rotation 'hadamard'"),
        ({"adapter": {"name": "lora"}}, "adapter"),
        ({"quant_method": "awq", "zero_point": True}, "checkpoint_format 'gptq'"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", gptq_settings(), lambda _, weight: gptq_of(weight), layers=1)
    change_settings(tmp_path / "hf", **fields)
    refuse_source(tmp_path, says)


def _act_order(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}g_idx"] = tensors[f"{MODULE}g_idx"].flip(0)


def _awq(tensors: dict[str, torch.Tensor]) -> None:
    held, _ = awq_of(torch.randn(64, 96))
    tensors.update({f"{MODULE}{part}": value.contiguous() for part, value in held.items()})


def _transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}qweight"] = tensors[f"{MODULE}qweight"].T.contiguous()


def _compressed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}weight_packed"] = tensors[f"{MODULE}qweight"].clone()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_act_order, "g_idx orders inputs by their activations, but config.json says desc_act false"),
        (_awq, "qweight is of shape [96, 8], but config.json calls for [12, 64]"),
        (_transposed, "qweight is of shape [64, 12], but config.json calls for [12, 64]"),
        (
            _compressed,
            "weight_packed, which is not part of a model of LLaMA: it is one of those of compressed-tensors, and",
        ),
        (lambda tensors: tensors.pop(f"{MODULE}qzeros"), "calls for the tensor qzeros"),
        (lambda tensors: tensors.update({f"{MODULE}bias": torch.ones(64)}), "bias"),
        (lambda tensors: tensors.update({f"{MODULE}scales": torch.ones(3, 64).int()}), "scales is of type int32"),
    ],
)
def test_tensors_that_are_refused(change: Any, says: str, tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", gptq_settings(), lambda _, weight: gptq_of(weight), layers=1)
    change_tensors(tmp_path / "hf", change)
    refuse_source(tmp_path, says)


def test_groups_that_there_are_not(tmp_path: Path) -> None:
    encode = lambda _, weight: gptq_of(weight, order=shuffled(weight.shape[1]))  # noqa: E731
    write_quantized(tmp_path / "hf", gptq_settings(desc_act=True), encode, layers=1)
    change_tensors(tmp_path / "hf", lambda tensors: tensors[f"{MODULE}g_idx"][5].fill_(3))
    refuse_source(tmp_path, "names groups beyond the 3")
    change_tensors(tmp_path / "hf", lambda tensors: tensors.pop(f"{MODULE}g_idx"))
    refuse_source(tmp_path, "calls for the tensor g_idx")


def test_a_zero_point_that_wrapped(tmp_path: Path) -> None:
    """15 in version 1 is 0 to some tools and 16 to others; in version 2 it is 15."""
    write_quantized(tmp_path / "hf", gptq_settings(), lambda _, weight: gptq_of(weight), layers=1)
    change_tensors(tmp_path / "hf", lambda tensors: tensors[f"{MODULE}qzeros"][1, 2].fill_(0xF0))
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "plain", exit_code=2).stderr
    assert f"{MODULE}qzeros holds zero points of 15, less 1" in said
    change_settings(tmp_path / "hf", checkpoint_format="gptq_v2")
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "second")


def test_a_model_that_does_not_say_that_it_is_quantized(tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", gptq_settings(), lambda _, weight: gptq_of(weight), layers=1)
    edit_json(tmp_path / "hf" / "config.json", lambda content: content.pop("quantization_config"))
    refuse_source(tmp_path, "it is one of those of GPTQ", "config.json doesn't say that weights are quantized")


def test_sizes_that_the_format_does_not_have(tmp_path: Path) -> None:
    write_quantized(tmp_path / "hf", gptq_settings(), lambda _, weight: gptq_of(weight), layers=1)
    edit_json(tmp_path / "hf" / "config.json", lambda content: content.update(intermediate_size=92))
    refuse_source(tmp_path, "has 92 ", "GPTQ's integers of 4 bits come 8 at a time")
