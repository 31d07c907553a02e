"""Directories and files of weights that are refused: what is in them can't be taken for a model's tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from invoke import invoke, refuse_source
from models import SMALL, edit_json, random_tensors, snapshot, write_hf
from safetensors.torch import save_file

from converters.cli import command as convert
from converters.console.errors import DuplicateTensor, InputError, MissingTensor, UnexpectedTensor, UnmappedTensor
from converters.sources.huggingface.source import open_hf
from converters.sources.opening import open_source

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and values."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: dict[str, Any] | str, values: bytes, length: int | None = None) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + values)


# --- not a checkpoint


def test_no_such_folder(tmp_path: Path) -> None:
    refuse_source(tmp_path, str(tmp_path / "hf"), "does not exist")


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    refuse_source(tmp_path, str(tmp_path / "hf"), "no config.json")


def test_file_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("hello")
    refuse_source(tmp_path, str(tmp_path / "hf"), ".gguf")


def test_folder_without_weights(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    refuse_source(tmp_path, "model.safetensors, model.safetensors.index.json, pytorch_model.bin")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", "null", "3", '{"model_type": "llama"}', "\udcff\udcfe", "[" * 100000, "[" * 900 + "]" * 900],
)
def test_config_that_is_none(text: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(text, errors="surrogateescape")
    refuse_source(tmp_path, "config.json")


def test_config_that_is_a_folder(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    (tmp_path / "hf" / "config.json").mkdir()
    refuse_source(tmp_path, "config.json")


def test_unfinished_conversion_is_no_source(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / ".in-progress.json").write_text("{}")
    refuse_source(tmp_path, str(tmp_path / "hf"), "unfinished", "llama-convert")


# --- safetensors files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 0.3, 0.9, 0.9999])
def test_truncated(share: float, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    refuse_source(tmp_path, str(path), "not a whole safetensors file")


def test_bytes_too_many(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refuse_source(tmp_path, str(path))


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [16, 17]},
        {"shape": [16]},
        {"shape": [2**62, 2**62]},
        {"shape": [-16, -16]},
        {"dtype": "F32"},
        {"dtype": "X99"},
        {"data_offsets": [0, 0]},
        {"data_offsets": [512, 0]},
        {"data_offsets": [0, 512]},
        {"data_offsets": [-512, 0]},
        {"data_offsets": [2**40, 2**40 + 512]},
        {"data_offsets": [2**64 - 512, 2**64]},
        {"data_offsets": "0, 512"},
        {"data_offsets": None},
    ],
    ids=str,
)
def test_header_that_lies(entry: dict[str, Any], tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    header, values = read_header(path)
    header[Q_PROJ] |= entry
    write_header(path, header, values)
    refuse_source(tmp_path, str(path))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_header_length_that_lies(length: int, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    write_header(path, *read_header(path), length)
    refuse_source(tmp_path, str(path))


def test_two_tensors_of_the_same_bytes(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    header, values = read_header(path)
    header[Q_PROJ]["data_offsets"] = header["model.layers.0.self_attn.q_proj.weight"]["data_offsets"]
    write_header(path, header, values)
    refuse_source(tmp_path, str(path))


# --- indexes

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "place",
    [
        "../x.safetensors",
        "{root}/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "x.safetensors\n",
        "x.json",
        7,
        None,
        [],
    ],
)
def test_index_that_points_elsewhere(place: Any, tmp_path: Path) -> None:
    """The file is there and holds the tensor: only its place is wrong."""
    index = write_hf(tmp_path / "hf", files=2) / INDEX
    (tmp_path / "hf" / "sub").mkdir()
    place = place.format(root=tmp_path) if isinstance(place, str) else place
    for folder in ("", "hf/sub", "hf"):
        save_file(random_tensors(), tmp_path / folder / "x.safetensors")
    edit_json(index, lambda content: content["weight_map"].update({Q_PROJ: place}))
    refuse_source(tmp_path, str(index), Q_PROJ)


@pytest.mark.parametrize("content", [{}, [], {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, None])
def test_index_without_a_map(content: Any, tmp_path: Path) -> None:
    index = write_hf(tmp_path / "hf", files=2) / INDEX
    index.write_text(json.dumps(content))
    refuse_source(tmp_path, str(index), "weight_map")


def test_index_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", files=3)
    (tmp_path / "hf" / "model-00002-of-00003.safetensors").unlink()
    refuse_source(tmp_path, INDEX, "model-00002-of-00003.safetensors")


# --- names: four kinds of error


def refused_as(kind: type[InputError], root: Path, *says: str) -> None:
    with pytest.raises(InputError) as error:
        open_hf(root / "hf")
    assert type(error.value) is kind
    refuse_source(root, *says)


@pytest.mark.parametrize("files", [1, 3])
def test_missing_tensor(files: int, tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors[Q_PROJ]
    write_hf(tmp_path / "hf", tensors, files=files)
    refused_as(MissingTensor, tmp_path, f"lacks the tensor {Q_PROJ}")


def test_missing_tensor_that_the_index_promises(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", files=2)
    tensors = random_tensors()
    first = list(tensors)[::2]
    save_file({name: tensors[name] for name in first[:-1]}, tmp_path / "hf" / "model-00001-of-00002.safetensors")
    refused_as(MissingTensor, tmp_path, first[-1], "model-00001-of-00002.safetensors")


def test_head_of_an_untied_model_is_missing(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors["lm_head.weight"]
    write_hf(tmp_path / "hf", tensors)
    refused_as(MissingTensor, tmp_path, "lm_head.weight")


def test_unexpected_tensor(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", num_hidden_layers=1)
    refused_as(UnexpectedTensor, tmp_path, "model.layers.1.", "has 1 layers")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "transformer.h.0.attn.weight", "x", "a\nb\x1b[2J\u2028c", "\ud800"]
)
def test_unmapped_tensor(name: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", random_tensors() | {"zz": torch.ones(2)}) / "model.safetensors"
    header, values = read_header(path)
    header[name] = header.pop("zz")
    write_header(path, header, values)
    if name == "\ud800":  # no text: the library refuses the header
        refuse_source(tmp_path, str(path))
    else:
        refused_as(UnmappedTensor, tmp_path, name.split("\n")[0])


def test_duplicate_tensor(tmp_path: Path) -> None:
    """Two files of a set hold it; the index names one of them."""
    write_hf(tmp_path / "hf", files=2)
    tensors = random_tensors()
    held = dict.fromkeys([*list(tensors)[1::2], Q_PROJ, next(iter(tensors))])
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][-1, -1] += 1
    save_file({name: tensors[name] for name in held}, tmp_path / "hf" / "model-00002-of-00002.safetensors")
    refused_as(DuplicateTensor, tmp_path, "model.embed_tokens.weight", "00001-of-00002", "00002-of-00002")


def test_duplicate_tensor_in_one_header(tmp_path: Path) -> None:
    """The library itself would keep the second of the two entries and say nothing."""
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    header, values = read_header(path)
    text = json.dumps(header | {"twice": header[Q_PROJ]}).replace('"twice"', json.dumps(Q_PROJ))
    write_header(path, text, values)
    refused_as(DuplicateTensor, tmp_path, str(path), Q_PROJ)


# --- GGUF


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "gpt.gguf", "gpt2")
    writer.add_context_length(16)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    refuse_source(tmp_path, "'gpt2'", "'llama'", source="gpt.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 16, b"not a gguf file at all......."])
def test_gguf_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refuse_source(tmp_path, str(tmp_path / "m.gguf"), source="m.gguf")


def test_the_source_is_left_alone_by_success_too(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", files=2)
    before = snapshot(tmp_path / "hf")
    assert open_source(tmp_path / "hf").config == SMALL
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out")
    assert snapshot(tmp_path / "hf") == before
