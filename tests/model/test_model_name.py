"""What a model is called, from its files and the paths that people give."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gguf_files import write as write_gguf
from invoke import invoke
from meta_format import write_meta
from models import SMALL, edit_json, make_model, write_hf

from converters.cli import command as convert
from converters.model.families.hf_config import from_hf, to_hf
from converters.sources.opening import open_source
from quantize.cli import command as quantize

HASH = "0123456789abcdef0123456789abcdef01234567"
SNAPSHOT = f"models--org--My-Model-7b/snapshots/{HASH}"


def unnamed(directory: Path) -> Path:
    """A Hugging Face directory whose config.json says no name."""
    write_hf(directory)
    edit_json(directory / "config.json", lambda fields: fields.pop("_name_or_path"))
    return directory


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my-model", "my-model"),
        (SNAPSHOT, "My-Model-7b"),
        ("models--org--My-Model-7b/snapshots/main", "My-Model-7b"),
        (f"models--org--My-Model-7b/snapshots/{HASH}/fp16", "My-Model-7b"),
        (f"models--gpt2/snapshots/{HASH}", "gpt2"),
        (f"models--org--a--b/snapshots/{HASH}", "a--b"),
        (f"models--org--outer/snapshots/{HASH}/models--org--inner/snapshots/{HASH}", "inner"),
        ("snapshots/main", "main"),
        ("models--org--name", "models--org--name"),
        (f"mirror/Other-7b/snapshots/{HASH}", "Other-7b"),
    ],
)
def test_the_folders_name(folder: str, name: str, tmp_path: Path) -> None:
    assert open_source(unnamed(tmp_path / folder)).config.name == name


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("org/Said-7b", "Said-7b"),
        ("/data/Said-7b/", "Said-7b"),
        ("Said-7b", "Said-7b"),
        (f"/root/.cache/hub/models--org--Said-7b/snapshots/{HASH}", "Said-7b"),
        (f"/root/.cache/hub/models--org--Said-7b/snapshots/{HASH}/", "Said-7b"),
        (HASH, "My-Model-7b"),
        (f"somewhere/{HASH}", "My-Model-7b"),
        (".", "My-Model-7b"),
        ("./", "My-Model-7b"),
        ("..", "My-Model-7b"),
        ("", "My-Model-7b"),
        ("/", "My-Model-7b"),
        (None, "My-Model-7b"),
        (7, "My-Model-7b"),
    ],
)
def test_what_config_json_says_goes_before(said: object, name: str, tmp_path: Path) -> None:
    assert open_source(write_hf(tmp_path / SNAPSHOT, _name_or_path=said)).config.name == name


@pytest.mark.parametrize(
    "way", ["relative", "absolute", "slash", "dot", "dots", "link", "link of a hash's name", "inner dots"]
)
def test_however_the_path_is_written(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = unnamed(tmp_path / SNAPSHOT)
    (snapshot / "inside").mkdir()
    os.symlink(snapshot, tmp_path / "linked")
    os.symlink(snapshot, tmp_path / HASH)
    monkeypatch.chdir({"dot": snapshot, "dots": snapshot / "inside"}.get(way, tmp_path))
    path, name = {
        "relative": (SNAPSHOT, "My-Model-7b"),
        "absolute": (str(snapshot), "My-Model-7b"),
        "slash": (f"{SNAPSHOT}/", "My-Model-7b"),
        "dot": (".", "My-Model-7b"),
        "dots": ("..", "My-Model-7b"),
        "link": ("linked", "linked"),
        "link of a hash's name": (HASH, "My-Model-7b"),
        "inner dots": (f"{SNAPSHOT}/inside/..", "My-Model-7b"),
    }[way]
    assert open_source(Path(path)).config.name == name


@pytest.mark.parametrize(
    ("folder", "name"), [(f"{SNAPSHOT}/original", "My-Model-7b"), (SNAPSHOT, "My-Model-7b"), ("llama/7B", "7B")]
)
def test_a_directory_of_metas(folder: str, name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", heads=8, hidden=48, ffn=128)
    assert open_source(write_meta(tmp_path / folder, model, 1)).config.name == name


@pytest.mark.parametrize(
    ("said", "name"),
    [("A Name", "A Name"), (None, "model-q8"), (HASH, "model-q8"), ("", "model-q8"), ("..", "model-q8")],
)
def test_a_gguf_file_in_a_cache(said: str | None, name: str, tmp_path: Path) -> None:
    (tmp_path / SNAPSHOT).mkdir(parents=True)
    path = write_gguf(tmp_path / SNAPSHOT / "model-q8.gguf", change={"general.name": said})
    assert open_source(path).config.name == name


def test_the_name_goes_along(tmp_path: Path) -> None:
    """Shown by each command, also with shards made straight from the cache, and with a config.json alone."""
    source = unnamed(tmp_path / SNAPSHOT)
    shown = "My-Model-7b, 2 layers"
    assert shown in invoke(convert, "--source", source, "--out", tmp_path / "checkpoint").stdout
    assert shown in invoke(quantize, tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out").stdout
    assert shown in invoke(quantize, source, "--int8", "--out", tmp_path / "direct").stdout
    assert shown in invoke(convert, "--source", tmp_path / "out", "--out", tmp_path / "back").stdout
    arguments = ("--config", source / "config.json", "--storage", "seed", "--out", tmp_path / "random")
    assert shown in invoke(convert, *arguments).stdout


def test_no_name_at_all() -> None:
    assert from_hf(to_hf(SMALL) | {"_name_or_path": HASH}).name == "llama"
