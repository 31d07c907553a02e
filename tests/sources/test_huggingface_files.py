"""Which files of a Hugging Face directory are read where several could be: the ones that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from agreement import load, notes_of
from invoke import refuse_source
from models import edit_json, make_model, write_hf

INDEX = "model.safetensors.index.json"
SHARDED = "20KB"


def add(folder: Path, seed: int, form: str = "safetensors", indexed: bool = False) -> None:
    """Another model's weights into a folder, over files of the same names and beside all others."""
    made = folder.with_name(f"made-{seed}-{form}-{indexed}")
    make_model(made, seed=seed, form=form, max_shard_size=SHARDED if indexed else None)
    shutil.copytree(made, folder, dirs_exist_ok=True)


def _single_beside_an_index_whose_files_are_gone(folder: Path) -> None:
    add(folder, 1, indexed=True)
    for path in folder.glob("model-0*"):
        path.unlink()
    add(folder, 2)


def _single_beside_an_older_set(folder: Path) -> None:
    add(folder, 1, indexed=True)
    add(folder, 2)


def _bin_beside_an_older_set(folder: Path) -> None:
    add(folder, 1, "bin", indexed=True)
    add(folder, 2, "bin")


def _safetensors_and_bin(folder: Path) -> None:
    add(folder, 1, "bin")
    add(folder, 2)


def _set_of_safetensors_and_bin(folder: Path) -> None:
    add(folder, 1, "bin")
    add(folder, 2, indexed=True)


def _set_of_bin_and_safetensors(folder: Path) -> None:
    add(folder, 1, "bin", indexed=True)
    add(folder, 2)


SEVERAL: dict[Callable[[Path], None], list[str]] = {
    _single_beside_an_index_whose_files_are_gone: ["model.safetensors", INDEX],
    _single_beside_an_older_set: ["model.safetensors", INDEX],
    _bin_beside_an_older_set: ["pytorch_model.bin", "pytorch_model.bin.index.json"],
    _safetensors_and_bin: ["model.safetensors", "pytorch_model.bin"],
    _set_of_safetensors_and_bin: [INDEX, "pytorch_model.bin"],
    _set_of_bin_and_safetensors: ["model.safetensors", "pytorch_model.bin.index.json"],
}


@pytest.mark.parametrize("fill", SEVERAL, ids=lambda fill: fill.__name__.strip("_"))
def test_several_forms_in_one_folder(fill: Callable[[Path], None], tmp_path: Path) -> None:
    fill(tmp_path / "hf")
    [note] = notes_of(tmp_path / "hf", tmp_path / "out")
    assert f"holds {' and '.join(SEVERAL[fill])}: {SEVERAL[fill][0]} is read" in note


def test_a_variant_is_not_read(tmp_path: Path) -> None:
    add(tmp_path / "variant", 1)
    add(tmp_path / "hf", 2)
    shutil.copy(tmp_path / "variant" / "model.safetensors", tmp_path / "hf" / "model.fp16.safetensors")
    assert notes_of(tmp_path / "hf", tmp_path / "out") == []


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "model.safetensors.index.fp16.json", "pytorch_model.fp16.bin"]
)
def test_variants_alone(name: str, tmp_path: Path) -> None:
    """transformers finds no weights either, unless it is told the variant."""
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / name)
    with pytest.raises(OSError, match="no file named"):
        load(tmp_path / "hf")
    refuse_source(tmp_path, "not a whole checkpoint", name)


def test_file_that_the_configuration_names(tmp_path: Path) -> None:
    add(tmp_path / "hf", 1)
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "mine.safetensors")
    add(tmp_path / "hf", 2)
    edit_json(tmp_path / "hf" / "config.json", lambda fields: fields.update(transformers_weights="mine.safetensors"))
    assert notes_of(tmp_path / "hf", tmp_path / "out") == []


@pytest.mark.parametrize("name", ["../model.safetensors", "none.safetensors", "model.bin", ".safetensors", "", 7])
def test_file_that_the_configuration_names_wrongly(name: object, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", transformers_weights=name)
    shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path)
    for other in ("model.bin", ".safetensors"):
        shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / other)
    refuse_source(tmp_path, "transformers_weights", repr(name))


@pytest.mark.parametrize("name", ["model +1 (2).safetensors", "modèle-'#%&;=@~[1],^!.safetensors", "-rf.safetensors"])
def test_odd_names_of_files(name: str, tmp_path: Path) -> None:
    add(tmp_path / "hf", 1, indexed=True)
    first = sorted(tmp_path.joinpath("hf").glob("model-0*"))[0]
    first.rename(first.with_name(name))
    text = (tmp_path / "hf" / INDEX).read_text()
    (tmp_path / "hf" / INDEX).write_text(text.replace(json.dumps(first.name), json.dumps(name)))
    assert notes_of(tmp_path / "hf", tmp_path / "out") == []


@pytest.mark.parametrize(
    "name", ["a/b.safetensors", "/b.safetensors", "..\\b.safetensors", ".b.safetensors", "a\0b.safetensors", "x" * 300]
)
def test_names_that_are_no_plain_files(name: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", files=2)
    edit_json(tmp_path / "hf" / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    refuse_source(tmp_path, INDEX, "lm_head.weight", "in the same folder")


@pytest.mark.parametrize("indexed", [False, True])
def test_links_as_in_a_cache_of_the_hub(indexed: bool, tmp_path: Path) -> None:
    add(tmp_path / "hf", 1, indexed=indexed)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(tmp_path.joinpath("hf").iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    assert notes_of(tmp_path / "hf", tmp_path / "out") == []


def test_index_that_places_a_tensor_in_another_of_its_files(tmp_path: Path) -> None:
    """Nobody reads a tensor by its place: all of all files are loaded."""
    add(tmp_path / "hf", 1, indexed=True)
    places = json.loads((tmp_path / "hf" / INDEX).read_text())["weight_map"]
    norm, last = "model.layers.0.input_layernorm.weight", list(places.values())[-1]
    assert last != places[norm]
    assert list(places.values()).count(places[norm]) > 1  # the file stays in the index
    edit_json(tmp_path / "hf" / INDEX, lambda index: index["weight_map"].update({norm: last}))
    assert notes_of(tmp_path / "hf", tmp_path / "out") == []


def test_index_that_lists_a_buffer_which_is_gone(tmp_path: Path) -> None:
    add(tmp_path / "hf", 1, indexed=True)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def list_it(index: dict) -> None:
        index["weight_map"][buffer] = next(iter(index["weight_map"].values()))

    edit_json(tmp_path / "hf" / INDEX, list_it)
    assert notes_of(tmp_path / "hf", tmp_path / "out") == []


def _split(folder: Path, change: float) -> None:
    """A set of two files that both hold a norm, in the second with ``change`` added to its last value."""
    add(folder, 1, "bin", indexed=True)
    first, second = sorted(folder.glob("pytorch_model-*.bin"))
    name, again = "model.layers.0.input_layernorm.weight", torch.load(second)
    again[name] = torch.load(first)[name].clone()
    again[name][-1] += change
    torch.save(again, second)


def test_the_same_tensor_in_two_files(tmp_path: Path) -> None:
    _split(tmp_path / "hf", change=0.0)
    [note] = notes_of(tmp_path / "hf", tmp_path / "out")
    assert note == ("1 tensor left out: held twice, with the same values (model.layers.0.input_layernorm.weight).")


def test_another_tensor_of_the_same_name_in_two_files(tmp_path: Path) -> None:
    _split(tmp_path / "hf", change=1e-6)
    refuse_source(tmp_path, "input_layernorm", "held twice", "00001-of-00002.bin", "00002-of-00002.bin")
