"""Directories of shards that --verify, re-sharding and llama-run must refuse, each by what is wrong with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from invoke import invoke, refuse
from models import SMALL, edit_json, renew, write_hf
from safetensors.torch import load_file, save_file

from converters.console.errors import InputError, MissingTensor, UnexpectedTensor
from quantize.cli import command as quantize
from quantize.shards.reading import Shards
from runtime.cli import command as run

CHIP0, CHIP1 = "chip-00-of-02.safetensors", "chip-01-of-02.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for 2 chips and for 4, of one model."""
    root = tmp_path_factory.mktemp("made")
    write_hf(root / "hf")
    for chips in (2, 4):
        invoke(quantize, root / "hf", "--int8", "--chips", chips, "--out", root / f"out{chips}")
    return root


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "out2", tmp_path / "out")
    return tmp_path / "out"


def verified(out: Path, *says: str) -> None:
    refuse(out.parent, quantize, "--verify", "--out", out, says=says)


def resharded(out: Path, *says: str) -> None:
    refuse(out.parent, quantize, out, "--int8", "--chips", 3, "--out", out.parent / "new", says=says)


def loaded(out: Path, *says: str) -> None:
    arguments = ("--shards", out, "--backend", "eager", "--prompt-ids", "1,2", "--max-new-tokens", 2)
    refuse(out.parent, run, *arguments, "--max-seq-len", 8, says=says)


EVERYWHERE = (verified, resharded, loaded)


def test_undamaged(out: Path) -> None:
    """What the tests below damage is sound: all three commands take it."""
    assert "every digest" in invoke(quantize, "--verify", "--out", out).stdout
    invoke(quantize, out, "--int8", "--chips", 3, "--out", out.parent / "new")
    arguments = ("--shards", out, "--backend", "eager", "--prompt-ids", "1,2", "--max-new-tokens", 2)
    invoke(run, *arguments, "--max-seq-len", 8)


@pytest.mark.parametrize("refused", [verified, loaded])
def test_no_such_directory(refused: Callable[..., None], tmp_path: Path) -> None:
    refused(tmp_path / "none", str(tmp_path / "none"), "llama-quantize")


@pytest.mark.parametrize("refused", EVERYWHERE)
def test_no_manifest(refused: Callable[..., None], out: Path) -> None:
    (out / "shards.json").unlink()
    refused(out, str(out))


@pytest.mark.parametrize("refused", EVERYWHERE)
def test_unfinished(refused: Callable[..., None], out: Path) -> None:
    (out / ".in-progress.json").write_text("{}")
    refused(out, "unfinished", "llama-quantize")


@pytest.mark.parametrize("refused", EVERYWHERE)
@pytest.mark.parametrize("name", [CHIP0, CHIP1])
def test_file_missing(refused: Callable[..., None], name: str, out: Path) -> None:
    (out / name).unlink()
    refused(out, f"lacks {name}")


def test_many_files_missing(made: Path, tmp_path: Path) -> None:
    invoke(quantize, made / "hf", "--int8", "--chips", 16, "--out", tmp_path / "out")
    for path in (tmp_path / "out").glob("chip-*"):
        path.unlink()
    resharded(tmp_path / "out", "chip-00-of-16", "chip-07-of-16", "and 8 more")


def test_file_never_written(made: Path, tmp_path: Path) -> None:
    """With --only-chip a directory has some of the files: complete in itself, and not enough to split anew."""
    invoke(quantize, made / "hf", "--int8", "--chips", 2, "--only-chip", 1, "--out", tmp_path / "out")
    invoke(quantize, "--verify", "--out", tmp_path / "out")
    resharded(tmp_path / "out", f"lacks {CHIP0}")
    loaded(tmp_path / "out", f"lacks {CHIP0}")


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.9999])
def test_byte_changed(place: float, out: Path) -> None:
    path = out / CHIP1
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(place * (len(data) - header))] ^= 1
    path.write_bytes(data)
    verified(out, CHIP1, "changed", "sha256")


@pytest.mark.parametrize("refused", EVERYWHERE)
@pytest.mark.parametrize("size", [-1, 1, -(10**4)])
def test_length_changed(refused: Callable[..., None], size: int, out: Path) -> None:
    path = out / CHIP0
    os.truncate(path, max(0, path.stat().st_size + size))
    refused(out, CHIP0, "bytes long")


@pytest.mark.parametrize("refused", EVERYWHERE)
def test_file_of_another_chip_count(refused: Callable[..., None], made: Path, out: Path) -> None:
    shutil.copy(made / "out4" / "chip-01-of-04.safetensors", out / CHIP1)
    refused(out, CHIP1, "bytes long")
    renew(out, CHIP1)  # and even where the manifest says the same
    refused(out, CHIP1, "one of 2 chips", "another output")


@pytest.mark.parametrize("refused", EVERYWHERE)
def test_files_of_another_chip_count_beside_the_right_ones(refused: Callable[..., None], made: Path, out: Path) -> None:
    """Strangers do no harm, and don't count."""
    shutil.copy(made / "out4" / "chip-01-of-04.safetensors", out)
    (out / CHIP0).unlink()
    refused(out, f"lacks {CHIP0}")


@pytest.mark.parametrize("refused", EVERYWHERE)
def test_manifest_of_another_chip_count(refused: Callable[..., None], made: Path, out: Path) -> None:
    shutil.copy(made / "out4" / "shards.json", out)
    refused(out, "lacks chip-00-of-04")


@pytest.mark.parametrize("refused", EVERYWHERE)
def test_manifest_that_is_none(refused: Callable[..., None], out: Path) -> None:
    for text in ("", "{", "\0", "[" * 100000):
        (out / "shards.json").write_text(text)
        refused(out, "shards.json", "not valid JSON")
    for text in ("[]", "null", "{}"):
        (out / "shards.json").write_text(text)
        refused(out, "shards.json", "format version")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 4}, "format version 4"),
        ({"format_version": 3}, "damaged"),  # which would have formats by tensor
        ({"format_version": "1"}, "format version 1"),
        ({"format_version": True}, "format version True"),
        ({"format_version": None}, "format version None"),
        ({"chips": 0}, "damaged"),
        ({"chips": 2.0}, "damaged"),
        ({"chips": 10**9}, "damaged"),
        ({"scheme": "int4"}, "damaged"),
        ({"scheme": ["int8"]}, "damaged"),
        ({"scheme": "bf16"}, "lists other tensors"),
        ({"chips": 4}, "lists other tensors"),
        ({"quantized_lm_head": True}, "lists other tensors"),
        ({"quantized_lm_head": 0}, "damaged"),
        ({"tensors": {}}, "lists other tensors"),
        ({"tensors": None}, "lists other tensors"),
        ({"files": []}, "damaged"),
        ({"files": {"../chip-00-of-02.safetensors": {}}}, "not one of 2 chips"),
        ({"files": {"chip-02-of-02.safetensors": {}}}, "not one of 2 chips"),
        ({"files": {CHIP0: {}}}, "no size and sha256"),
        ({"files": {CHIP0: {"bytes": "1", "sha256": "0" * 64}}}, "no size and sha256"),
        ({"files": {CHIP0: {"bytes": 1, "sha256": "0" * 63 + "\n"}}}, "no size and sha256"),
        ({"files": {CHIP0: {"bytes": -1, "sha256": "0" * 64}}}, CHIP0),
        ({"model": 7}, "damaged"),
        ({"source_fingerprint": None}, "damaged"),
    ],
    ids=str,
)
def test_manifest_that_cannot_be_true(change: dict[str, Any], says: str, out: Path) -> None:
    edit_json(out / "shards.json", lambda content: content.update(change))
    for refused in EVERYWHERE:
        refused(out, says)


def test_shape_in_the_manifest(out: Path) -> None:
    edit_json(out / "shards.json", lambda content: content["tensors"]["lm_head.weight"].update(shape=[50, 17]))
    verified(out, "lists other tensors")


@pytest.mark.parametrize("refused", EVERYWHERE)
def test_config_of_another_model(refused: Callable[..., None], out: Path) -> None:
    edit_json(out / "config.json", lambda content: content.update(vocab_size=51))
    refused(out, "shards.json", "config.json")
    (out / "config.json").unlink()
    refused(out, "config.json does not exist")


@pytest.mark.parametrize("kind", [MissingTensor, UnexpectedTensor, InputError])
def test_tensors_of_a_file(kind: type[InputError], out: Path) -> None:
    """The manifest agrees with the file; the layout does not."""
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(out / CHIP1)
    if kind is MissingTensor:
        del tensors[name + "_scale"]
    elif kind is UnexpectedTensor:
        tensors["model.layers.2.mlp.down_proj.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name].float()
    save_file(tensors, out / CHIP1)
    renew(out, CHIP1)
    with pytest.raises(InputError) as error:
        Shards(out).verify(lambda done: None)
    assert type(error.value) is kind
    for refused in EVERYWHERE:
        refused(out, CHIP1, "model.layers.")


def test_other_scheme(out: Path) -> None:
    for flags in (("--bf16",), ("--int8", "--quantize-lm-head")):
        refuse(out.parent, quantize, out, *flags, "--out", out.parent / "new", says=["--int8", "re-sharded"])


def test_report_missing(out: Path) -> None:
    (out / "quantization_report.json").unlink()
    resharded(out, "quantization_report.json")


@pytest.mark.parametrize("layers", [SMALL.num_layers + 1, 100])
def test_layers_that_are_not_there(layers: int, out: Path) -> None:
    arguments = ("--shards", out, "--backend", "eager", "--prompt-ids", "1", "--layers", layers)
    refuse(out.parent, run, *arguments, says=[f"--layers {layers}", "1 to 2"])
    refuse(out.parent, quantize, out, "--int8", "--layers", layers, "--out", out.parent / "new", says=["1 to 2"])
