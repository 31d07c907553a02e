"""Calibration refused, each by what is wrong: arguments that don't go together, texts, directories of others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrated import make_inputs, write_text
from invoke import invoke, notes, refuse
from models import write_hf
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from quantize.cli import command as quantize


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def refused(made: tuple[Path, Path], root: Path, *options: object, says: list[str]) -> None:
    refuse(root, quantize, made[0], "--int4", "--group-size", 64, *options, "--out", root / "out", says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "gptq"), ["--method gptq", "add --calibrate"]),
        (("--method", "awq"), ["--method awq", "add --calibrate"]),
        (("--moments", "m"), ["--moments", "add --calibrate"]),
        (("--calibrate", "TEXT", "--method", "rtn"), ["--method rtn", "leave out"]),
        (("--calibrate", "TEXT", "--method", "best"), ["best"]),
        (("--calibrate", "TEXT", "--calibration-tokens", 0), ["0"]),
        (("--calibrate", "none.txt"), ["none.txt", "no file"]),
        (("--calibrate", "."), ["give text as .txt"]),
    ],
    ids=str,
)
def test_arguments(made: tuple[Path, Path], options: tuple[object, ...], says: list[str], tmp_path: Path) -> None:
    options = tuple(made[1] if each == "TEXT" else each for each in options)
    if "best" in options or 0 in options:  # click's own words
        code = invoke(quantize, made[0], "--int4", *options, "--out", tmp_path / "out", exit_code=2)
        assert all(words in code.stderr for words in says)
        assert not list(tmp_path.iterdir())
        return
    refused(made, tmp_path, *options, says=says)


@pytest.mark.parametrize("method", ["scale", "gptq", "awq"])
def test_shards_are_not_calibrated(made: tuple[Path, Path], method: str, tmp_path: Path) -> None:
    invoke(quantize, made[0], "--int8", "--out", tmp_path / "shards")
    options = ("--calibrate", made[1], "--method", method, "--out", tmp_path / "new")
    refuse(tmp_path, quantize, tmp_path / "shards", *options, says=["holds shards", "leave out --calibrate"])


@pytest.mark.parametrize("method", ["scale", "gptq"])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"Some text.", ["no tokenizer.json", "token ids"]),
        ("a.json", b"[1, 2, 211]", ["the token 211", "0 to 210"]),
        ("a.json", b"[1, -1]", ["the token -1"]),
        ("a.json", b"[1, 2.5]", ["2.5", "whole numbers"]),
        ("a.json", b"[1, true]", ["True"]),
        ("a.json", b"{}", ["a list of token ids"]),
        ("a.json", b"\xff[1]", ["no JSON"]),
        ("a.json", b"[" * 100000, ["no JSON"]),
        ("a.json", b"[]", ["--calibrate text"]),
        ("a.npy", b"no array", ["numpy.save"]),
        ("a.npy", b"", ["numpy.save"]),
        ("a.bin", b"", [".txt", ".json"]),
    ],
    ids=lambda each: each[:12] if isinstance(each, bytes) else None,
)
def test_texts(
    made: tuple[Path, Path], method: str, name: str, content: bytes, says: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(made, tmp_path, "--calibrate", tmp_path / name, "--method", method, says=says)


@pytest.mark.parametrize("array", [np.zeros((2, 3), int), np.ones(4), np.array([1, 500])], ids=["2d", "float", "id"])
def test_arrays(made: tuple[Path, Path], array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    refused(made, tmp_path, "--calibrate", tmp_path / "a.npy", says=["a.npy"])


def test_not_utf8(made: tuple[Path, Path], tmp_path: Path) -> None:
    """With a tokenizer, which text needs."""
    shutil.copytree(made[0], tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(Tokenizer(BPE({"a": 0, "b": 1}, [])).to_str())
    (tmp_path / "a.txt").write_bytes(b"ab\xe9")
    options = ("--int8", "--calibrate", tmp_path / "a.txt", "--out", tmp_path / "out")
    refuse(tmp_path, quantize, tmp_path / "hf", *options, says=["a.txt is not UTF-8"])
    (tmp_path / "a.txt").write_bytes(b"abba")
    invoke(quantize, tmp_path / "hf", *options)


def test_fewer_tokens_than_asked_for_is_said(made: tuple[Path, Path], tmp_path: Path) -> None:
    result = invoke(quantize, made[0], "--int8", "--calibrate", made[1], "--out", tmp_path / "out")
    assert any("holds 600 tokens, fewer than the 8192" in line for line in notes(result))


def test_two_texts(made: tuple[Path, Path], tmp_path: Path) -> None:
    """One after the other, as one."""
    ids = json.loads(made[1].read_text())
    for name, part in (("a", ids[:500]), ("b", ids[500:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    both = ("--calibrate", tmp_path / "a.json", "--calibrate", tmp_path / "b.json")
    invoke(quantize, made[0], "--int8", *both, "--moments", tmp_path / "m", "--out", tmp_path / "1")
    one = invoke(
        quantize, made[0], "--int8", "--calibrate", made[1], "--moments", tmp_path / "m", "--out", tmp_path / "2"
    )
    assert any("it is taken" in line for line in notes(one))


@pytest.mark.parametrize("name", ["moments.safetensors", "calibration-00000.safetensors", "config.json"])
def test_a_directory_of_others(made: tuple[Path, Path], name: str, tmp_path: Path) -> None:
    """Files named like ours that we didn't write are neither read nor replaced."""
    (tmp_path / "m").mkdir()
    save_file({"x": torch.ones(3)}, tmp_path / "m" / name)
    refused(made, tmp_path, "--calibrate", made[1], "--moments", tmp_path / "m", says=["--moments"])


@pytest.mark.parametrize("method", ["scale", "gptq"])
def test_a_foreign_file_named_like_what_is_kept(
    made: tuple[Path, Path], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It turns up after the directory was found empty: the run stops there and it stays."""
    from runtime.calibrate import scratch

    directory = tmp_path / ("out" if method == "gptq" else "m")
    save = scratch.Scratch.save

    def first(self: scratch.Scratch, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        save_file({"x": torch.ones(3)}, directory / f"calibration-{layer:05d}.safetensors")
        save(self, layer, tensors)

    monkeypatch.setattr(scratch.Scratch, "save", first)
    options = ("--calibrate", made[1], "--method", method, "--out", tmp_path / "out")
    kept = () if method == "gptq" else ("--moments", directory)
    error = invoke(quantize, made[0], "--int4", "--group-size", 64, *options, *kept, exit_code=2)
    assert "calibration-00000.safetensors was not written by this tool" in error.stderr
    assert [path.name for path in directory.iterdir() if path.suffix == ".safetensors"] == [
        "calibration-00000.safetensors"
    ]


def test_a_foreign_file_named_like_what_is_unfinished(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no file of this run, and stays."""
    from runtime.calibrate import scratch

    foreign, save = tmp_path / "m" / "calibration-00000.safetensors.partial", scratch.Scratch.save

    def first(self: scratch.Scratch, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        if layer == 0:
            foreign.write_bytes(b"somebody's")
        save(self, layer, tensors)

    monkeypatch.setattr(scratch.Scratch, "save", first)
    options = ("--calibrate", made[1], "--moments", tmp_path / "m", "--out", tmp_path / "out")
    invoke(quantize, made[0], "--int4", "--group-size", 64, *options)
    assert foreign.read_bytes() == b"somebody's"


@pytest.mark.parametrize("content", [b"", b"{}", b"\x08" + bytes(7) + b"{broken}"])
def test_damaged_moments(made: tuple[Path, Path], content: bytes, tmp_path: Path) -> None:
    """They are not what was recorded: refused in words that name them."""
    options = ("--calibrate", made[1], "--moments", tmp_path / "m")
    invoke(quantize, made[0], "--int8", *options, "--out", tmp_path / "a")
    (tmp_path / "m" / "moments.safetensors").write_bytes(content)
    refused(made, tmp_path, *options, says=["something else than the moments", "--moments"])


def test_moments_that_are_gone(made: tuple[Path, Path], tmp_path: Path) -> None:
    """They are gathered again."""
    options = ("--calibrate", made[1], "--moments", tmp_path / "m")
    invoke(quantize, made[0], "--int8", *options, "--out", tmp_path / "a")
    kept = (tmp_path / "m" / "moments.safetensors").read_bytes()
    (tmp_path / "m" / "moments.safetensors").unlink()
    invoke(quantize, made[0], "--int4", "--group-size", 64, *options, "--out", tmp_path / "b")
    assert (tmp_path / "m" / "moments.safetensors").read_bytes() == kept


@pytest.mark.parametrize("method", ["scale", "gptq"])
def test_dry_run(made: tuple[Path, Path], method: str, tmp_path: Path) -> None:
    """It calibrates nothing and leaves nothing, and still checks the text."""
    options = (made[0], "--int4", "--group-size", 64, "--dry-run", "--out", tmp_path / "out", "--method", method)
    result = invoke(quantize, *options, "--calibrate", made[1])
    assert "without calibration" in result.stdout
    assert not list(tmp_path.iterdir())
    text = write_text(tmp_path / "a.json")
    text.write_text("[999]")
    refuse(tmp_path, quantize, *options, "--calibrate", text, says=["the token 999"])


@pytest.mark.parametrize("method", ["scale", "gptq"])
def test_weights_that_are_not_finite(method: str, tmp_path: Path) -> None:
    """Named, whatever they make of the inputs behind them."""
    from models import SMALL, random_tensors

    tensors = random_tensors(SMALL)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name][2, 3] = float("nan")
    write_hf(tmp_path / "hf", tensors)
    text = tmp_path / "a.json"
    text.write_text(json.dumps([each % 50 for each in range(90)]))
    options = ("--int8", "--calibrate", text, "--method", method, "--moments", tmp_path / "m")
    options = options[:-2] if method == "gptq" else options
    error = invoke(quantize, tmp_path / "hf", *options, "--out", tmp_path / "out", exit_code=2)
    assert name in error.stderr
