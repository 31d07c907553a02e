"""A source given as one file, or as a directory with GGUF files: by what is in it, not by its name."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from gguf_files import write as write_gguf
from invoke import invoke, refuse_source
from models import snapshot, write_hf
from safetensors.torch import save
from test_gguf_parts import write_split
from tokenizer_models import train_sentencepiece

from converters.cli import command as convert
from converters.sources.opening import open_source
from quantize.cli import command as quantize

SHA1, SHA256 = "0123456789abcdef" * 2 + "01234567", "0123456789abcdef" * 4
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + SHA256.encode() + b"\nsize 12\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>model</title></head></html>"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.gguf", "model"),
        ("Model-3.1-8B.Q4_K_M.gguf", "Model-3.1-8B.Q4_K_M"),
        ("Model-3.1-8B.Q4_K_M.GGUF", "Model-3.1-8B.Q4_K_M"),
        ("model.gguf.1", "model"),
        ("model.gguf.download.bak", "model"),
        ("Model-3.1-8B", "Model-3.1-8B"),
        ("model.bin", "model.bin"),
        (f"models--org--My-Model-3.1/blobs/{SHA256}", "My-Model-3.1"),
        (f"models--org--My-Model-3.1/snapshots/{SHA1}/file.gguf", "file"),
        (f"blobs/sha256-{SHA256}", "llama"),
        (SHA256, "llama"),
    ],
)
def test_a_gguf_file_by_its_first_bytes(file: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(tmp_path / "w", change={"general.name": None})
    shutil.move(tmp_path / "w", path)
    assert open_source(path).config.name == name


def test_a_gguf_file_without_a_suffix_is_converted(tmp_path: Path) -> None:
    write_gguf(tmp_path / "named.gguf")
    shutil.copy(tmp_path / "named.gguf", tmp_path / SHA256)
    for source, out in (("named.gguf", "a"), (SHA256, "b")):
        invoke(convert, "--source", tmp_path / source, "--out", tmp_path / out)
    same = ("config.json", "model-00001-of-00001.safetensors")
    first, second = ({name: snapshot(tmp_path / out)[name] for name in same} for out in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("suffix", ["", ".GGUF", ".gguf"])
def test_a_split_model_of_any_suffix(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    renamed = [path.rename(path.with_suffix(suffix)) for path in write_split(folder / "Model-3.1.gguf")]
    assert open_source(renamed[1]).files() == renamed
    assert open_source(folder).files() == renamed


# --- directories


def test_a_directory_with_one_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "alone.gguf")
    folder = tmp_path / "folder"
    for name, content in (("README.md", "a model"), ("config.json", '{"model_type": "llama"}'), ("tokenizer.json", "")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    os.symlink(tmp_path / "alone.gguf", folder / "model.gguf")
    said = invoke(convert, "--source", folder, "--out", tmp_path / "a").stderr
    assert f"Note: {folder} holds a GGUF file and no other weights: model.gguf is read, and no file beside it." in said
    invoke(convert, "--source", tmp_path / "alone.gguf", "--out", tmp_path / "b")
    weights = "model-00001-of-00001.safetensors"
    assert snapshot(tmp_path / "a")[weights] == snapshot(tmp_path / "b")[weights]
    invoke(quantize, folder, "--int8", "--out", tmp_path / "out")


def test_a_directory_with_several_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for name in ("b.Q4_0.gguf", "a.GGUF", SHA256):
        write_gguf(tmp_path / "hf" / name)
    refuse_source(tmp_path, f"3 GGUF files: {SHA256}, a.GGUF, b.Q4_0.gguf. Give one of them")


def test_weights_of_another_form_go_first(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "hf")
    write_gguf(directory / "model.gguf")
    assert open_source(directory).files() == [directory / "model.safetensors"]
    (directory / "model.safetensors").rename(directory / "model.fp16.safetensors")
    refuse_source(tmp_path, "It has model.fp16.safetensors")


# --- files of other kinds


def packed(tar: bool) -> bytes:
    """An archive of one file."""
    content = io.BytesIO()
    if tar:
        with tarfile.open(fileobj=content, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("model.gguf"))
    else:
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("model.gguf", b"GGUF")
    return content.getvalue()


def saved(legacy: bool = False) -> bytes:
    content = io.BytesIO()
    torch.save({"a": torch.ones(2)}, content, _use_new_zipfile_serialization=not legacy)
    return content.getvalue()


TENSORS = save({"a": torch.ones(2)})
KINDS = {
    "safetensors": ("model.safetensors", TENSORS, "a safetensors file. Give its directory, {root}, with"),
    "safetensors without a suffix": ("model", TENSORS, "a safetensors file. Give its directory, {root}, with"),
    "damaged safetensors": ("model.safetensors", TENSORS[:20], "a safetensors file. Give its directory, {root}, with"),
    "bin": ("pytorch_model.bin", saved(), "a file of torch.save. Give its directory, {root}, with"),
    "legacy bin": ("pytorch_model.bin", saved(legacy=True), "a file of torch.save. Give its directory, {root}, with"),
    "pth": ("consolidated.00.pth", saved(), "a file of torch.save. Give its directory, {root}, with"),
    "zip": ("model.zip", packed(tar=False), "an archive. Unpack it"),
    "damaged zip": ("model.zip", packed(tar=False)[:40], "an archive. Unpack it"),
    "tar": ("model.tar", packed(tar=True), "an archive. Unpack it"),
    "gz": ("model.gguf.gz", gzip.compress(b"GGUF"), "compressed. Unpack it"),
    "bz2": ("model.gguf.bz2", bz2.compress(b"GGUF"), "compressed. Unpack it"),
    "json": ("config.json", b'{"model_type": "llama"}', "a JSON file. Give its directory, {root}, with"),
    "lfs": ("model.gguf", POINTER, "a pointer of Git LFS in place of the file itself. Run in its directory: git lfs"),
    "page": ("model.gguf", PAGE, "a web page in place of the file itself, whose address has /resolve/"),
    "ggml": ("ggml-model-q4_0.bin", b"tjgg" + bytes(60), "in GGML's format, which came before GGUF. Make a GGUF file"),
    "hdf5": ("tf_model.h5", b"\x89HDF\r\n\x1a\n" + bytes(60), "in TensorFlow's format (HDF5). Give a directory"),
    "empty": ("model.gguf", b"", "empty. Give a .gguf file"),
    "text": ("model.gguf", b"hello", "a file of no known kind. Give a .gguf file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_files(kind: str, tmp_path: Path) -> None:
    name, content, says = KINDS[kind]
    (tmp_path / name).write_bytes(content)
    refuse_source(tmp_path, str(tmp_path / name), f"is {says.format(root=tmp_path)}", source=name)


@pytest.mark.parametrize("stand_in", [POINTER, PAGE], ids=["pointer", "page"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "model.gguf"]
)
def test_files_of_a_directory_that_stand_in_for_others(name: str, stand_in: bytes, tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "hf")
    (directory / "tokenizer.model").write_bytes(train_sentencepiece())
    if name == "model.gguf":
        (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(stand_in)
    what = "a pointer of Git LFS" if stand_in == POINTER else "a web page"
    refuse_source(tmp_path, f"{directory / name} is {what} in place of the file itself")
