"""What a refusal advises, done: then the command takes what it refused, without another copy of the same file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.scripts import gguf_new_metadata
from gguf_files import VOCAB
from gguf_files import write as write_gguf
from invoke import invoke, refuse, refuse_source
from models import edit_json, make_opt, random_tensors, write_hf
from safetensors.torch import load_file
from test_tokenizer_settings import MODEL, saved
from tokenizer_models import train_sentencepiece

from converters.cli import command as convert
from quantize.cli import command as quantize
from runtime.cli import command as run

INDEX = "model.safetensors.index.json"


def check(root: Path, says: list[str], follow: Callable[[], tuple[object, ...]], *given: object) -> None:
    """A conversion of ``given`` is refused in words that say what to do; ``follow`` does it and gives the arguments."""
    refuse(root, convert, *given, "--out", root / "out", says=says)
    invoke(convert, *follow(), "--out", root / "out")


def hf(root: Path, files: dict[str, bytes]) -> Path:
    """A Hugging Face directory with these files beside the weights."""
    write_hf(root / "hf", config=MODEL)
    for name, content in files.items():
        (root / "hf" / name).write_bytes(content)
    return root / "hf"


AWAY = "Correct or replace it, or take it away: without a tokenizer, llama-run takes --prompt-ids."


@pytest.mark.parametrize(
    ("files", "bad"),
    [
        ({"tokenizer.model": b"\x0a\xff damaged"}, "tokenizer.model"),
        ({"tokenizer.model": b"!!!! 0\n"}, "tokenizer.model"),
        ({"tokenizer.model": b"IQ== 0\nIg== 2\n"}, "tokenizer.model"),
        ({"tokenizer.model": None, "added_tokens.json": b'{"<x>": "one"}'}, "added_tokens.json"),
        ({"tokenizer.model": None, "added_tokens.json": b'{"<x>": 5000}'}, "added_tokens.json"),
        ({"tokenizer.model": None, "tokenizer_config.json": b"{"}, "tokenizer_config.json"),
        ({"tokenizer.model": None, "special_tokens_map.json": b"[1]"}, "special_tokens_map.json"),
    ],
    ids=str,
)
def test_tokenizers_files_are_taken_away(files: dict[str, bytes | None], bad: str, tmp_path: Path) -> None:
    source = hf(
        tmp_path, {name: train_sentencepiece() if content is None else content for name, content in files.items()}
    )

    def follow() -> tuple[object, ...]:
        (source / bad).unlink()
        return ("--source", source)

    check(tmp_path, [AWAY], follow, "--source", source)


@pytest.mark.parametrize(
    ("name", "content"), [("vocab.json", b"{"), ("vocab.json", b'{"a": 1}'), ("merges.txt", b"\xff")]
)
def test_gpt2s_files_are_taken_away(name: str, content: bytes, tmp_path: Path) -> None:
    make_opt(tmp_path / "hf")
    for file, whole in (("vocab.json", b'{"a": 0, "b": 1}'), ("merges.txt", b""), (name, content)):
        (tmp_path / "hf" / file).write_bytes(whole)

    def follow() -> tuple[object, ...]:
        (tmp_path / "hf" / name).unlink()
        return ("--source", tmp_path / "hf")

    check(tmp_path, [AWAY], follow, "--source", tmp_path / "hf")


def test_a_token_around_texts_without_a_name(tmp_path: Path) -> None:
    source = hf(tmp_path, {"tokenizer_config.json": b'{"add_eos_token": true, "tokenizer_class": "GPT2Tokenizer"}'})
    for file, content in (("vocab.json", b'{"a": 0, "b": 1}'), ("merges.txt", b"")):
        (source / file).write_bytes(content)

    def follow() -> tuple[object, ...]:
        edit_json(source / "tokenizer_config.json", lambda fields: fields.update(add_eos_token=False))
        return ("--source", source)

    check(tmp_path, ["add_eos_token asks for", "Set it to false in tokenizer_config.json"], follow, "--source", source)


TOKENIZER = {"model": "llama", "tokens": [f"t{i}" for i in range(VOCAB)], "scores": [0.0] * VOCAB}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": ["same"] * VOCAB}, "gives tokens 0 and 1 the same text"),
        ({"tokens": [f"t{i}" for i in range(VOCAB + 1)], "scores": [0.0] * (VOCAB + 1)}, "has 25 tokens but 24 rows"),
        ({"tokens": ["x" * 300, *TOKENIZER["tokens"][1:]]}, "has a token of more than 256 characters"),
        ({"model": "bert"}, "has a tokenizer of kind 'bert'"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a b"]}, "joins tokens that its vocabulary lacks"),
    ],
    ids=["same text", "rows", "long", "kind", "merges"],
)
def test_a_gguf_files_tokenizer_is_left_out(
    change: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {f"tokenizer.ggml.{key}": value for key, value in {**TOKENIZER, **change}.items()}
    source, copy = write_gguf(tmp_path / "model.gguf", change=keys), tmp_path / "copy.gguf"
    command = "gguf-new-metadata --remove-metadata tokenizer.ggml.model INPUT OUTPUT"

    def follow() -> tuple[object, ...]:
        arguments = command.replace("INPUT", str(source)).replace("OUTPUT", str(copy)).split(" ")
        monkeypatch.setattr(sys, "argv", [*arguments, "--force"])
        gguf_new_metadata.main()
        return ("--source", copy)

    check(tmp_path, [words, f"from a copy: {command}."], follow, "--source", source)


@pytest.mark.parametrize("later", ["pytorch_model.bin", None])
def test_an_index_of_files_that_nobody_has(later: str | None, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", files=2)
    whole = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in source.glob("*.safetensors"):
        path.unlink()
    if later is None:
        says = "which is not there. Fetch it, or convert again."
        refuse(tmp_path, convert, "--source", source, "--out", tmp_path / "out", says=[says])
        return
    torch.save(whole, source / later)

    def follow() -> tuple[object, ...]:
        (source / INDEX).unlink()
        return ("--source", source)

    check(tmp_path, [f"Fetch it, or take {INDEX} away: then {later} is read."], follow, "--source", source)


def test_values_beyond_float16(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e6)
    source = ("--source", write_hf(tmp_path / "hf", tensors))
    check(tmp_path, ["--dtype bfloat16"], lambda: (*source, "--dtype", "bfloat16"), *source, "--dtype", "float16")


def test_nan(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.norm.weight"][0] = torch.nan
    write_hf(tmp_path / "hf", tensors)
    says = "The tensor model.norm.weight holds NaN or infinite values. Fetch the source again, or give another."
    refuse_source(tmp_path, says)


def test_a_file_of_a_directory(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf") / "model.safetensors"
    given = ("--source", source.parent)
    check(tmp_path, [f"Give its directory, {source.parent}, with"], lambda: given, "--source", source)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tokenizer.json", "Put the model's own there, or take it away and give --prompt-ids."),
        ("tokenizer_config.json", "Put the model's own there, or take it away"),
        ("generation_config.json", "holds no JSON object; correct it, or take it away."),
    ],
)
def test_small_files_beside_shards(name: str, says: str, tmp_path: Path) -> None:
    source = hf(tmp_path, {"tokenizer.json": saved().encode(), "generation_config.json": b"{}"})
    invoke(convert, "--source", source, "--out", tmp_path / "checkpoint")
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(b"[")
    sizes = ("--max-new-tokens", 1, "--max-seq-len", 64, "--buckets", 32, "--backend", "eager", "--prompt-ids", "1,2")
    refuse(tmp_path, run, "--shards", tmp_path / "out", *sizes, says=[name, says])
    (tmp_path / "out" / name).unlink()
    invoke(run, "--shards", tmp_path / "out", *sizes)
