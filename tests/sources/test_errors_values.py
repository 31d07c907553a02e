"""Weights that are refused for their shape, type or values, pickles for what they would do, seeds for what they say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke, refuse, refuse_source
from models import edit_json, random_tensors, write_hf

from converters.cli import command as convert

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def test_shape_that_contradicts_the_config(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", random_tensors() | {Q_PROJ: torch.ones(16, 8)})
    refuse_source(tmp_path, Q_PROJ, "[16, 8]", "[16, 16]", "config.json")


@pytest.mark.parametrize(
    ("dtype", "shown"),
    [(torch.int8, "int8"), (torch.int64, "int64"), (torch.uint8, "uint8"), (torch.float8_e4m3fn, "float8_e4m3fn")],
)
def test_type_that_is_no_weight(dtype: torch.dtype, shown: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", random_tensors() | {Q_PROJ: torch.ones(16, 16).to(dtype)})
    refuse_source(tmp_path, Q_PROJ, f"of type {shown}", "bfloat16, float16, float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight", "lm_head.weight"])
def test_value_that_is_no_number(value: float, name: str, tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[name].view(-1)[-3] = value
    write_hf(tmp_path / "hf", tensors)
    refuse_source(tmp_path, name, "NaN or infinite")


def test_value_too_large_for_the_dtype(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[Q_PROJ][3, 3] = 1e5
    write_hf(tmp_path / "hf", tensors)
    arguments = ("--source", tmp_path / "hf", "--out", tmp_path / "out")
    refuse(tmp_path, convert, *arguments, "--dtype", "float16", says=[Q_PROJ, "float16", "--dtype"])
    invoke(convert, *arguments)


# --- pickles


class Payload:
    """Unpickled by plain pickle, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


def write_bin(root: Path, content: Any, **how: Any) -> Path:
    write_hf(root / "hf")
    (root / "hf" / "model.safetensors").unlink()
    torch.save(content, root / "hf" / "pytorch_model.bin", **how)
    return root / "hf" / "pytorch_model.bin"


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_would_run_a_program(zipped: bool, tmp_path: Path) -> None:
    content = {**random_tensors(), "extra": Payload(tmp_path / "owned")}
    path = write_bin(tmp_path, content, _use_new_zipfile_serialization=zipped)
    refuse_source(tmp_path, str(path), "can't be loaded safely")
    assert not (tmp_path / "owned").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "owned").exists()  # the payload is real: only we did not run it


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_pickle_that_holds_an_odd_tensor(zipped: bool, tmp_path: Path) -> None:
    for odd in (torch.eye(16).to_sparse(), torch.eye(16).to_sparse_csr(), torch.empty(16, 16, device="meta")):
        path = write_bin(tmp_path, random_tensors() | {Q_PROJ: odd}, _use_new_zipfile_serialization=zipped)
        refuse_source(tmp_path, str(path), Q_PROJ)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": {"a": 1}}, {1: torch.ones(2)}, "text", None])
def test_pickle_of_something_else(content: Any, zipped: bool, tmp_path: Path) -> None:
    path = write_bin(tmp_path, content, _use_new_zipfile_serialization=zipped)
    refuse_source(tmp_path, str(path), "does not hold a dictionary of tensors")


@pytest.mark.parametrize("size", [0, 1, 10, 500, 3000])
def test_truncated_pickle(size: int, tmp_path: Path) -> None:
    path = write_bin(tmp_path, random_tensors())
    os.truncate(path, size)
    refuse_source(tmp_path, str(path))


# --- seeds


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 2}, "format version"),
        ({"format_version": None}, "format version"),
        ({"seed": -1}, "can't make"),
        ({"seed": "0"}, "can't make"),
        ({"seed": True}, "can't make"),
        ({"distribution": {"name": "uniform"}}, "can't make"),
    ],
    ids=str,
)
def test_seed_that_cannot_be_followed(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    invoke(convert, "--config", "tiny", "--storage", "seed", "--out", tmp_path / "hf")
    edit_json(tmp_path / "hf" / "random_init.json", lambda content: content.update(change))
    refuse_source(tmp_path, "random_init.json", says)
