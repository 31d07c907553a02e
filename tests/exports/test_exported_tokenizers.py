"""Tokenizers in GGUF files: read back by this tool's converter they give the ids of the shards' tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from invoke import invoke, notes, refuse
from models import SMALL, write_hf
from tokenizer_models import TEXTS, tiktoken_file, train_byte_level, train_sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from converters.cli import command as convert
from converters.model.config import ModelConfig
from converters.sources.gguf.source import open_gguf
from converters.sources.opening import open_source
from converters.tokenizers.pre_tokenizers import LLAMA3, PRE_TOKENIZERS, WORDS
from converters.tokenizers.reader import read_tokenizer

ROWS = 832


def config(**fields: Any) -> ModelConfig:
    from dataclasses import replace

    return replace(SMALL, vocab_size=ROWS, **fields)


def source_with(root: Path, files: dict[str, bytes], **fields: Any) -> Path:
    """A checkpoint with these auxiliary files."""
    from models import random_tensors

    shape = config(**fields)
    write_hf(root / "hf", random_tensors(shape), shape)
    for name, content in files.items():
        (root / "hf" / name).write_bytes(content)
    return root / "hf"


def exported(root: Path, files: dict[str, bytes], **fields: Any) -> tuple[Path, list[str]]:
    """The file, and what was noted."""
    hf = source_with(root, files, **fields)
    said = notes(invoke(convert, "--source", hf, "--format", "gguf", "--out", root / "out"))
    return root / "out" / "model.gguf", said


def tokenizers_of(root: Path, path: Path) -> tuple[Tokenizer, Tokenizer]:
    """The source's tokenizer, and the one that the file gives back."""
    files = open_source(root / "hf").auxiliary_files()
    ours, _ = read_tokenizer(files, "hf", ROWS)
    return ours, Tokenizer.from_str(open_gguf(path).auxiliary_files()["tokenizer.json"].decode())


def assert_same_ids(root: Path, path: Path, *more: str) -> None:
    ours, again = tokenizers_of(root, path)
    for text in (*TEXTS, *more):
        assert again.encode(text).ids == ours.encode(text).ids, text


def metadata_of(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items()}


def byte_level(patterns: tuple[str, ...], whole_words: bool = False, bos: bool = False) -> dict[str, bytes]:
    """tokenizer.json with chat tokens, as transformers saves one, and its settings."""
    from tokenizers import Regex

    tokens, merges = train_byte_level(WORDS)
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), ignore_merges=whole_words))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in ("<s>", "<|im_end|>", "<pad>")]
    tokenizer.add_tokens([*special, AddedToken("<tool>", special=False, normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 800)])
    fields = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": "{{ messages }}"}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **fields}).encode(),
    }


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "default"])
@pytest.mark.parametrize("bos", [False, True])
def test_byte_level(name: str, bos: bool, tmp_path: Path) -> None:
    cut = PRE_TOKENIZERS[name]
    path, said = exported(tmp_path, byte_level(cut.patterns, cut.whole_words, bos))
    assert said == []
    assert_same_ids(tmp_path, path, "<s>one<|im_end|> two<tool>three")
    found = metadata_of(path)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == name
    assert len(found["tokenizer.ggml.tokens"]) == ROWS
    assert found["tokenizer.ggml.token_type"][798:806] == [1, 1, 3, 3, 3, 4, 5, 5]
    ids = [found[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "padding")]
    assert ids == [800, 801, 802]
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (bos, False)
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_steps_of_transformers_own_files(tmp_path: Path) -> None:
    """GPT-2's step that cuts and maps bytes at once, after single digits: SmolLM2's."""
    files = byte_level(())
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=True)]
    )
    path, said = exported(tmp_path, files | {"tokenizer.json": tokenizer.to_str().encode()})
    assert said == []
    assert metadata_of(path)["tokenizer.ggml.pre"] == "smollm"
    assert_same_ids(tmp_path, path)


def test_llama_3(tmp_path: Path) -> None:
    """From Meta's file of ranks, with three tokens that end texts."""
    tokens, _ = train_byte_level(LLAMA3.patterns[0], 512)
    ids = {name: 512 + place for name, place in (("bos", 0), ("eos", 1), ("eom", 8), ("eot", 9))}
    ends = (ids["eos"], ids["eom"], ids["eot"])
    path, _ = exported(tmp_path, {"tokenizer.model": tiktoken_file(tokens)}, bos_token_id=512, eos_token_ids=ends)
    assert_same_ids(tmp_path, path)
    found = metadata_of(path)
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert set(open_gguf(path).config.eos_token_ids) == set(ends)
    assert found["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize("kept", ["tokenizer.model", "tokenizer.json"])
def test_sentencepiece(kept: str, tmp_path: Path) -> None:
    """Scores of the vocabulary itself, or such as lead to the merges of a tokenizer.json alone."""
    model = train_sentencepiece()
    settings = json.dumps({"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}).encode()
    hf = source_with(tmp_path, {"tokenizer.model": model, "tokenizer_config.json": settings})
    if kept == "tokenizer.json":
        files = open_source(hf).auxiliary_files()
        (hf / "tokenizer.model").unlink()
        (hf / "tokenizer.json").write_bytes(files["tokenizer.json"])
    said = notes(invoke(convert, "--source", hf, "--format", "gguf", "--out", tmp_path / "out"))
    path = tmp_path / "out" / "model.gguf"
    assert said == []
    assert_same_ids(tmp_path, path)
    found = metadata_of(path)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert found["tokenizer.ggml.token_type"][300] == 1
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.bos_token_id"] == 1
    reader = sentencepiece.SentencePieceProcessor(model_proto=model)
    exact, scores = [reader.get_score(i) for i in range(reader.vocab_size())], found["tokenizer.ggml.scores"]
    if kept == "tokenizer.model":
        assert scores[:800] == pytest.approx(exact)
    joined = [i for i in range(259, 800) if len(reader.id_to_piece(i)) > 1]
    assert len({scores[i] for i in joined}) == len(joined)
    assert sorted(joined, key=lambda i: -scores[i]) == sorted(joined, key=lambda i: -exact[i])


def test_texts_that_become_other_tokens_are_said(tmp_path: Path) -> None:
    """As transformers 5 reads LLaMA's, no space goes before a text that begins with one; llama.cpp puts one there."""
    settings = json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>"}).encode()
    _, said = exported(tmp_path, {"tokenizer.model": train_sentencepiece(), "tokenizer_config.json": settings})
    assert any("' leading and trailing '" in each for each in said)


def test_no_tokenizer(tmp_path: Path) -> None:
    path, _ = exported(tmp_path, {})
    assert metadata_of(path)["tokenizer.ggml.model"] == "no_vocab"


@pytest.mark.parametrize("kind", ["unigram", "rule"])
def test_what_is_refused(kind: str, tmp_path: Path) -> None:
    """By the kind's name, or by the rule's, with what to do about it."""
    if kind == "unigram":
        files = {"tokenizer.model": train_sentencepiece(model_type="unigram")}
        says = ["Unigram", "tokenizer.json away"]
    else:
        files, says = byte_level((r"\w+",)), ["no name for", "tokenizer.json away"]
    hf = source_with(tmp_path, files)
    refuse(tmp_path, convert, "--source", hf, "--format", "gguf", "--out", tmp_path / "out", says=says)


@pytest.mark.slow
def test_smollm2(smollm2_gguf: Path, tmp_path: Path) -> None:
    """A real vocabulary, from GGUF to a checkpoint and to GGUF again: what llama.cpp reads of it is the same."""
    invoke(convert, "--source", smollm2_gguf, "--layers", 1, "--out", tmp_path / "hf")
    invoke(convert, "--source", tmp_path / "hf", "--format", "gguf", "--out", tmp_path / "out")
    before, after = (metadata_of(path) for path in (smollm2_gguf, tmp_path / "out" / "model.gguf"))
    for key in ("model", "pre", "tokens", "merges", "bos_token_id", "eos_token_id", "token_type"):
        assert after[f"tokenizer.ggml.{key}"] == before[f"tokenizer.ggml.{key}"], key
    assert after["tokenizer.chat_template"] == before["tokenizer.chat_template"]
