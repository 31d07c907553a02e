"""Sources that llama-convert must refuse: one line that names what is wrong, nothing written, nothing changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from invoke import invoke, invoke_error, refuse
from models import SMALL, random_tensors, snapshot, write_hf
from safetensors.torch import save_file

from converters.checkpoint import open_source
from converters.cli import command as convert
from converters.errors import DuplicateTensor, InputError, MissingTensor, UnexpectedTensor, UnmappedTensor
from converters.hf import open_hf
from quantize.cli import command as quantize

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def refused(root: Path, *says: str, source: str = "hf") -> str:
    """Convert and quantize both refuse ``root``/``source``, in the same words; returns them."""
    line = refuse(root, convert, "--source", root / source, "--out", root / "out", says=says)
    assert refuse(root, quantize, root / source, "--int8", "--out", root / "out") == line
    return line


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


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
    assert "does not exist" in refused(tmp_path, str(tmp_path / "hf"))


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    refused(tmp_path, str(tmp_path / "hf"), "no config.json")


def test_file_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("hello")
    refused(tmp_path, str(tmp_path / "hf"), ".gguf")


def test_folder_without_weights(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    refused(tmp_path, "model.safetensors.index.json, model.safetensors, pytorch_model.bin")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", "null", "3", '{"model_type": "llama"}', "\udcff\udcfe", "[" * 100000, "[" * 900 + "]" * 900],
)
def test_config_that_is_none(text: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(text, errors="surrogateescape")
    refused(tmp_path, "config.json")


def test_config_that_is_a_folder(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    (tmp_path / "hf" / "config.json").mkdir()
    refused(tmp_path, "config.json")


def test_unfinished_conversion_is_no_source(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / ".in-progress.json").write_text("{}")
    refused(tmp_path, str(tmp_path / "hf"), "unfinished", "llama-convert")


def test_shards_are_no_source_of_a_conversion(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "shards")
    refuse(tmp_path, convert, "--source", tmp_path / "shards", "--out", tmp_path / "out", says=["holds shards"])


# --- safetensors files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 0.3, 0.9, 0.9999])
def test_truncated(share: float, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    refused(tmp_path, str(path), "not a whole safetensors file")


def test_bytes_too_many(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(tmp_path, str(path))


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
    refused(tmp_path, str(path))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_header_length_that_lies(length: int, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    write_header(path, *read_header(path), length)
    refused(tmp_path, str(path))


def test_two_tensors_of_the_same_bytes(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    header, values = read_header(path)
    header[Q_PROJ]["data_offsets"] = header["model.layers.0.self_attn.q_proj.weight"]["data_offsets"]
    write_header(path, header, values)
    refused(tmp_path, str(path))


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
    refused(tmp_path, str(index), Q_PROJ)


@pytest.mark.parametrize("content", [{}, [], {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, None])
def test_index_without_a_map(content: Any, tmp_path: Path) -> None:
    index = write_hf(tmp_path / "hf", files=2) / INDEX
    index.write_text(json.dumps(content))
    refused(tmp_path, str(index), "weight_map")


def test_index_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", files=3)
    (tmp_path / "hf" / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, INDEX, "model-00002-of-00003.safetensors")


# --- names: four kinds of error


def refused_as(kind: type[InputError], root: Path, *says: str) -> None:
    with pytest.raises(InputError) as error:
        open_hf(root / "hf")
    assert type(error.value) is kind
    refused(root, *says)


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
        refused(tmp_path, str(path))
    else:
        refused_as(UnmappedTensor, tmp_path, name.split("\n")[0])


def test_duplicate_tensor(tmp_path: Path) -> None:
    """Two files of a set hold it; the index names one of them."""
    write_hf(tmp_path / "hf", files=2)
    tensors = random_tensors()
    held = dict.fromkeys([*list(tensors)[1::2], Q_PROJ, next(iter(tensors))])
    save_file({name: tensors[name] for name in held}, tmp_path / "hf" / "model-00002-of-00002.safetensors")
    refused_as(DuplicateTensor, tmp_path, "model.embed_tokens.weight", "00001-of-00002", "00002-of-00002")


def test_duplicate_tensor_in_one_header(tmp_path: Path) -> None:
    """The library itself would keep the second of the two entries and say nothing."""
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    header, values = read_header(path)
    text = json.dumps(header | {"twice": header[Q_PROJ]}).replace('"twice"', json.dumps(Q_PROJ))
    write_header(path, text, values)
    refused_as(DuplicateTensor, tmp_path, str(path), Q_PROJ)


# --- shapes and values


def test_shape_that_contradicts_the_config(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", random_tensors() | {Q_PROJ: torch.ones(16, 8)})
    refused(tmp_path, Q_PROJ, "[16, 8]", "[16, 16]", "config.json")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64, torch.float8_e4m3fn])
def test_type_that_is_no_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", random_tensors() | {Q_PROJ: torch.ones(16, 16).to(dtype)})
    refused(tmp_path, Q_PROJ, str(dtype)[6:].replace("float64", "F64").replace("int64", "I64")[:2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight", "lm_head.weight"])
def test_value_that_is_no_number(value: float, name: str, tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[name].view(-1)[-3] = value
    write_hf(tmp_path / "hf", tensors)
    refused(tmp_path, name, "NaN or infinite")


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
    refused(tmp_path, str(path), "can't be loaded safely")
    assert not (tmp_path / "owned").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "owned").exists()  # the payload is real: only we did not run it


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_pickle_that_holds_an_odd_tensor(tmp_path: Path) -> None:
    for odd in (torch.eye(16).to_sparse(), torch.eye(16).to_sparse_csr(), torch.empty(16, 16, device="meta")):
        path = write_bin(tmp_path, random_tensors() | {Q_PROJ: odd})
        refused(tmp_path, str(path), Q_PROJ)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": {"a": 1}}, {1: torch.ones(2)}, "text", None])
def test_pickle_of_something_else(content: Any, tmp_path: Path) -> None:
    refused(tmp_path, str(write_bin(tmp_path, content)), "does not hold a dictionary of tensors")


@pytest.mark.parametrize("size", [0, 1, 10, 500, 3000])
def test_truncated_pickle(size: int, tmp_path: Path) -> None:
    path = write_bin(tmp_path, random_tensors())
    os.truncate(path, size)
    refused(tmp_path, str(path))


# --- configurations


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "mistral"}, "'mistral'"),
        ({"model_type": 7}, "7"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_parameters": [1]}, "RoPE"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"num_key_value_heads": 0}, "num_kv_heads"),
        ({"head_dim": 3}, "odd"),
        ({"head_dim": None, "num_attention_heads": 3}, "no multiple"),
        ({"hidden_size": -16}, "hidden_size"),
        ({"hidden_size": 16.0}, "16.0"),
        ({"hidden_size": "16"}, "'16'"),
        ({"hidden_size": True}, "True"),
        ({"vocab_size": 10**300}, "vocab_size"),
        ({"num_hidden_layers": 10**6}, "num_layers"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_theta": 10**40}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"bos_token_id": 1.5}, "bos_token_id"),
        ({"torch_dtype": 7}, "dtype"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ],
    ids=str,
)
def test_config_that_asks_for_something_else(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", **fields)
    refused(tmp_path, says)
    alone = tmp_path / "hf" / "config.json"
    refuse(tmp_path, convert, "--config", alone, "--out", tmp_path / "out", says=[says])


def test_values_nested_to_the_limit_of_the_parser(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    text = path.read_text().replace('"hidden_size": 16', '"hidden_size": %s')
    for depth in (*range(850, 1000, 3), 10**4):
        path.write_text(text % ("[" * depth + "]" * depth))
        refused(tmp_path)


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\x1b[31mred", "x" * 100_000, "", "/", 7])
def test_odd_names_of_models_do_no_harm(name: Any, tmp_path: Path) -> None:
    """The name is shown and written again, so it must be plain text by then."""
    write_hf(tmp_path / "hf", _name_or_path=name)
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out").stdout
    assert len(said.splitlines()) == 1
    assert said.rstrip("\n").isprintable()
    assert len(said) < 1000
    invoke(quantize, tmp_path / "out", "--int8", "--out", tmp_path / "shards")


def test_gigantic_config_beside_a_small_file(tmp_path: Path) -> None:
    """Refused for what the file lacks: nothing of the promised size is allocated."""
    sizes = {"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 4096, "vocab_size": 1 << 24}
    write_hf(tmp_path / "hf", **sizes)
    refused(tmp_path, "lacks the tensor model.layers.2.")
    write_hf(tmp_path / "hf", **sizes | {"num_hidden_layers": 2})
    refused(tmp_path, "model.embed_tokens.weight", "[50, 16]", "[16777216, 1048576]")


# --- GGUF


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "gpt.gguf", "gpt2")
    writer.add_context_length(16)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    refused(tmp_path, "'gpt2'", "'llama'", source="gpt.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 16, b"not a gguf file at all......."])
def test_gguf_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path, str(tmp_path / "m.gguf"), source="m.gguf")


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
    refused(tmp_path, "random_init.json", says)


def test_the_source_is_left_alone_by_success_too(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", files=2)
    before = snapshot(tmp_path / "hf")
    assert open_source(tmp_path / "hf").config == SMALL
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out")
    assert "Error" not in invoke_error(convert, "--source", tmp_path / "no")[7:]
    assert snapshot(tmp_path / "hf") == before
