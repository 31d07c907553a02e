"""Tokens without a row of the embedding, from the source to llama-run: none ever reaches the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf_files import VOCAB
from gguf_files import write as write_gguf
from invoke import Result, invoke, refuse
from models import write_hf
from test_tokenizer_settings import MODEL, saved
from tokenizer_models import train_sentencepiece
from tokenizers import AddedToken, Tokenizer, models

from converters.cli import command as convert
from quantize.cli import command as quantize
from runtime.cli import command as run

PAD = "<pad>"
OWN = 800  # tokens of saved()


def shards_of(source: Path, root: Path) -> str:
    """Notes of the conversion of a source; the shards are in ``root``/out."""
    said = invoke(convert, "--source", source, "--dtype", "float32", "--out", root / "checkpoint").stderr
    invoke(quantize, root / "checkpoint", "--bf16", "--out", root / "out")
    return said


def arguments(root: Path, *prompt: str) -> tuple[object, ...]:
    sizes = ("--max-new-tokens", 1, "--max-seq-len", 64, "--buckets", 32)
    return (run, "--shards", root / "out", "--backend", "eager", "--dtype", "float32", *sizes, *prompt, "--json", "-")


def prompt_tokens(result: Result) -> int:
    return json.loads(result.stdout)["prompt_tokens"]


def source_with(root: Path, rows: int, added: list[dict[str, Any]] | None = None, **fields: Any) -> Path:
    """A model of so many rows with the tokenizer.json of ``saved``, ``added`` tokens and other ``fields``."""
    write_hf(root / "hf", config=replace(MODEL, vocab_size=rows))
    content = json.loads(saved(post=False)) | fields
    content["added_tokens"] += added or []
    (root / "hf" / "tokenizer.json").write_text(json.dumps(content))
    return root / "hf"


def entry(i: int, text: str, **flags: Any) -> dict[str, Any]:
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": i, "content": text, **settings, **flags}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "small_files", [{}, {"pad_token": PAD}, {"added_tokens_decoder": {str(OWN): {"content": PAD}}}]
)
def test_added_tokens_of_a_tokenizer_json(small_files: dict[str, Any], special: bool, tmp_path: Path) -> None:
    """Of two, one has a row."""
    source = source_with(tmp_path, OWN + 1, [entry(OWN, "<mask>"), entry(OWN + 1, PAD, special=special)])
    if "added_tokens_decoder" in small_files:
        small_files = {"added_tokens_decoder": {str(OWN): {"content": "<mask>"}, str(OWN + 1): {"content": PAD}}}
    (source / "tokenizer_config.json").write_text(json.dumps(small_files))
    said = shards_of(source, tmp_path)
    assert f"tokenizer.json has tokens beyond the model's {OWN + 1} rows of embeddings: '{PAD}'; " in said
    without = Tokenizer.from_str(saved(post=False))
    for text, ids in (("Hi there", None), (f"Hi{PAD}there", None), ("Hi<mask>there", OWN)):
        without.add_special_tokens([AddedToken("<mask>", normalized=False)])
        result = invoke(*arguments(tmp_path, "--prompt", text))
        expected = without.encode(text).ids
        assert prompt_tokens(result) == len(expected)
        assert ids is None or ids in expected
        assert (f"Note: The prompt holds '{PAD}'" in result.stderr) == (PAD in text)


def test_a_vocabulary_larger_than_the_embedding(tmp_path: Path) -> None:
    rows = 700
    said = shards_of(source_with(tmp_path, rows), tmp_path)
    assert f"beyond the model's {rows} rows of embeddings" in said
    assert " and 97 more; llama-run refuses a prompt that needs one." in said
    texts = ["Hi there", "the quick brown fox jumps"]
    ids = [Tokenizer.from_str(saved(post=False)).encode(text).ids for text in texts]
    assert max(ids[0]) < rows <= max(ids[1])
    assert prompt_tokens(invoke(*arguments(tmp_path, "--prompt", texts[0]))) == len(ids[0])
    first = next(i for i in ids[1] if i >= rows)
    refuse(tmp_path, *arguments(tmp_path, "--prompt", texts[1]), says=[f"token {first} (", "700 rows of embeddings"])


def test_a_token_around_texts_without_a_row(tmp_path: Path) -> None:
    single = [{"SpecialToken": {"id": PAD, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {PAD: {"id": PAD, "ids": [OWN], "tokens": [PAD]}}
    post = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    shards_of(source_with(tmp_path, OWN, [entry(OWN, PAD)], post_processor=post), tmp_path)
    refuse(tmp_path, *arguments(tmp_path, "--prompt", "Hi"), says=["gives the prompt token 800,", "--prompt-ids"])
    assert prompt_tokens(invoke(*arguments(tmp_path, "--prompt-ids", "1,2"))) == 2


@pytest.mark.parametrize("pairs", [True, False])
def test_a_tokenizer_json_of_pairs(pairs: bool, tmp_path: Path) -> None:
    """Unigram's vocabulary has its ids by the order of its entries."""
    words = [f"w{i}" for i in range(MODEL.vocab_size + 2)]
    unigram = models.Unigram([(word, 0.0) for word in words], 0)
    model = unigram if pairs else models.WordLevel({word: i for i, word in enumerate(words)}, "w0")
    write_hf(tmp_path / "hf", config=MODEL)
    Tokenizer(model).save(str(tmp_path / "hf" / "tokenizer.json"))
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out").stderr
    assert f"embeddings: '{words[-2]}', '{words[-1]}'; llama-run refuses" in said


def test_added_tokens_beside_a_tokenizer_model(tmp_path: Path) -> None:
    """As LLaMA 2 13B was first released: as many rows as pieces, and added_tokens.json with one more."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.model").write_bytes(train_sentencepiece())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "hf" / "tokenizer.model"))
    rows = pieces.get_piece_size()
    write_hf(tmp_path / "hf", config=replace(MODEL, vocab_size=rows))
    (tmp_path / "hf" / "added_tokens.json").write_text(json.dumps({PAD: rows}))
    assert f"adds the token '{PAD}'" in shards_of(tmp_path / "hf", tmp_path)
    for text in ("Hi there", f"Hi {PAD} there"):
        assert prompt_tokens(invoke(*arguments(tmp_path, "--prompt", text))) == 1 + len(pieces.encode(text))


@pytest.mark.parametrize("ids", ["1,24", "4294967295", "1,9223372036854775808"])
def test_prompt_ids(ids: str, tmp_path: Path) -> None:
    shards_of(write_gguf(tmp_path / "model.gguf"), tmp_path)
    refuse(tmp_path, *arguments(tmp_path, "--prompt-ids", ids), says=[ids.split(",")[-1], f"0 to {VOCAB - 1}"])


@pytest.mark.parametrize("more", [-4, 4])
def test_tokens_of_a_gguf_file(more: int, tmp_path: Path) -> None:
    count = VOCAB + more
    words = ["<unk>", "<s>", "</s>", "\u2581", *(chr(ord("a") + i) for i in range(count - 4))]
    keys = {"model": "llama", "tokens": words, "scores": [0.0] * count, "token_type": [2, 3, 3] + [1] * (count - 3)}
    change = {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {"tokenizer.ggml.eot_token_id": None}
    source = write_gguf(tmp_path / "model.gguf", change=change)
    if more > 0:
        says = [f"has {count} tokens but {VOCAB} rows of embeddings", "Give another file of the model"]
        refuse(tmp_path, convert, "--source", source, "--out", tmp_path / "out", says=says)
        return
    shards_of(source, tmp_path)
    assert prompt_tokens(invoke(*arguments(tmp_path, "--prompt", "abc"))) == 1 + len("_abc")
