"""Split GGUF models: opened by any part they are the model that they were split from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import METADATA, finish, random_tensors, refused, write
from invoke import invoke, refuse
from models import snapshot

from converters.cli import command as convert
from converters.console.errors import DuplicateTensor, InputError
from converters.model.parameters import parameters
from converters.sources.gguf.source import open_gguf


def write_split(
    path: Path, tensors: dict[str, tuple[np.ndarray, Type]] | None = None, per_part: int = 8, small_first: bool = False
) -> list[Path]:
    """The model of METADATA in parts of ``per_part`` tensors, by the gguf library's own writer."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_part, small_first_shard=small_first)
    for key, value in METADATA.items():
        kind = {int: "add_uint32", float: "add_float32", str: "add_string"}[type(value)]
        getattr(writer, kind)(key, value)
    finish(writer, tensors)
    return sorted(path.parent.glob(f"{path.stem}-*.gguf"))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The 21 tensors of a model in three files of a folder of their own."""
    (tmp_path / "parts").mkdir()
    return write_split(tmp_path / "parts" / "model.gguf")


@pytest.mark.parametrize("small_first", [False, True])
@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_any_part_opens_the_whole_model(small_first: bool, kind: Type, tmp_path: Path) -> None:
    tensors = random_tensors(kind)
    whole = open_gguf(write(tmp_path / "whole.gguf", tensors))
    paths = write_split(tmp_path / "model.gguf", tensors, small_first=small_first)
    assert [path.name for path in paths] == [
        f"model-{i:05d}-of-{len(paths):05d}.gguf" for i in range(1, len(paths) + 1)
    ]
    assert len(paths) >= 3
    prints = set()
    for path in paths:
        source = open_gguf(path)
        assert source.config == whole.config
        assert source.files() == paths
        prints.add(source.fingerprint())
        for parameter in parameters(whole.config):
            expected = whole.rows(parameter.name, 0, parameter.shape[0])
            assert torch.equal(source.rows(parameter.name, 0, parameter.shape[0]), expected), parameter.name
    assert len(prints) == 1


def test_converted_by_the_command(parts: list[Path], tmp_path: Path) -> None:
    write(tmp_path / "whole.gguf")
    invoke(convert, "--source", parts[1], "--out", tmp_path / "a")
    invoke(convert, "--source", tmp_path / "whole.gguf", "--out", tmp_path / "b")
    weights = "model-00001-of-00001.safetensors"
    assert snapshot(tmp_path / "a")[weights] == snapshot(tmp_path / "b")[weights]
    assert "already complete" in invoke(convert, "--source", parts[2], "--out", tmp_path / "a").stdout


def test_fingerprint_follows_every_part(parts: list[Path]) -> None:
    before = open_gguf(parts[0]).fingerprint()
    content = bytearray(parts[-1].read_bytes())
    content[-1] ^= 1
    parts[-1].write_bytes(content)
    assert open_gguf(parts[0]).fingerprint() != before


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_missing_part(lost: int, parts: list[Path], tmp_path: Path) -> None:
    parts[lost].unlink()
    given = parts[0 if lost else 1]
    refuse(tmp_path, convert, "--source", given, "--out", tmp_path / "out", says=[f"{parts[lost]} is missing"])


def test_renamed_part(parts: list[Path]) -> None:
    parts[1].rename(parts[1].with_name("some.gguf"))
    refused(parts[1].with_name("some.gguf"), InputError, "part 2 of 3", "NAME-00002-of-00003.gguf")


def test_exchanged_parts(parts: list[Path]) -> None:
    parts[1].rename(parts[1].with_name("x"))
    parts[2].rename(parts[1])
    parts[1].with_name("x").rename(parts[2])
    with pytest.raises(InputError, match=r"model-00002-of-00003.gguf is no part of the same model.*\(2, 3, 21\)"):
        open_gguf(parts[0])
    refused(parts[1], InputError, "part 3 of 3")


def test_part_of_a_model_of_another_size(parts: list[Path], tmp_path: Path) -> None:
    other = write_split(tmp_path / "other.gguf", random_tensors(layers=1, tied=True), per_part=4)
    assert len(other) == len(parts)
    shutil.copy(other[1], parts[1])
    with pytest.raises(InputError, match=r"model-00002-of-00003.gguf is no part of the same model .*\(1, 3, 11\)"):
        open_gguf(parts[0])


def test_part_with_the_tensors_of_another_split(parts: list[Path], tmp_path: Path) -> None:
    """As many parts and as many tensors in all, but cut elsewhere: one tensor is there twice, another is not."""
    tensors = random_tensors()
    names = list(tensors)
    other = write_split(tmp_path / "other.gguf", {name: tensors[name] for name in reversed(names)})
    shutil.copy(other[2], parts[2])
    with pytest.raises(DuplicateTensor, match="held twice"):
        open_gguf(parts[0])


def change(path: Path, key: str, form: type, value: int) -> None:
    """Another value for a number in a file's metadata."""
    content = bytearray(path.read_bytes())
    at = content.index(key.encode()) + len(key) + 4
    content[at : at + np.dtype(form).itemsize] = form(value).tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize("value", [0, 20, 22, -1])
def test_counts_of_tensors_that_lie(value: int, parts: list[Path]) -> None:
    for path in parts:
        change(path, "split.tensors.count", np.int32, value)
    refused(parts[0], InputError, "hold 21 tensors; split.tensors.count says")


@pytest.mark.parametrize(("key", "value"), [("split.no", 3), ("split.no", 65535), ("split.count", 65535)])
def test_numbers_that_lie(key: str, value: int, parts: list[Path]) -> None:
    change(parts[0], key, np.uint16, value)
    refused(parts[0], InputError, str(value), "fetch it again")


def test_a_whole_model_may_be_called_a_part(tmp_path: Path) -> None:
    path = write(tmp_path / "model-00001-of-00002.gguf")
    assert open_gguf(path).files() == [path]


def test_names_with_odd_characters(tmp_path: Path) -> None:
    directory: Any = tmp_path / "a b\nc-00001-of-00009"
    directory.mkdir()
    paths = write_split(directory / "x-00001-of-00002.gguf")
    assert open_gguf(paths[1]).files() == paths
