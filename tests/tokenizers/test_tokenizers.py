"""Tokenizers made into tokenizer.json, against the libraries that define them: SentencePiece and tiktoken."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from invoke import invoke, refuse_source
from meta_format import write_meta
from models import SMALL, edit_json, make_model, make_opt, write_hf
from tokenizer_models import TEXTS, as_bytes, novel, tiktoken_file, train_byte_level, train_sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from converters.cli import command as convert
from converters.console.errors import InputError
from converters.model.rope import Llama3Scaling, scaling_to_hf
from converters.sources.opening import open_source
from converters.tokenizers.sentencepiece import read_sentencepiece
from converters.tokenizers.tiktoken import read_tiktoken, special_tokens
from quantize.cli import command as quantize
from runtime.cli import command as run

# GPT-2's and LLaMA 3's patterns, in the words of the libraries that published them.
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def tokenizer_of(directory: Path) -> Tokenizer:
    """That of the source in a directory."""
    return Tokenizer.from_str(open_source(directory).auxiliary_files()["tokenizer.json"].decode())


def texts() -> list[str]:
    return [*TEXTS, *novel()[100:700]]


# --- SentencePiece


@pytest.fixture(scope="module")
def llama() -> bytes:
    return train_sentencepiece()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"user_defined_symbols": ["<sep>", "<|turn|>"], "pad_id": 3},
        {"byte_fallback": False, "add_dummy_prefix": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"model_type": "unigram"},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
    ids=str,
)
def test_sentencepiece_cuts_as_the_library_does(options: dict[str, Any]) -> None:
    model = train_sentencepiece(**options)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer, vocabulary = read_sentencepiece(model, "here")
    assert list(vocabulary.tokens) == [library.id_to_piece(i) for i in range(len(library))]
    assert [vocabulary.ids.get(name) for name in ("bos", "eos", "unknown")] == [1, 2, 0]
    for text in texts():
        assert tokenizer.encode(text).ids == library.encode(text), text


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.one_of(st.sampled_from("aAbehlnost '.\n1\u00e9"), st.characters(exclude_categories=["Cs"]))))
def test_any_text_is_cut_as_the_library_does(text: str) -> None:
    tokenizer, library = _small()
    if "\0" not in text and "\u2581" not in text:  # the library writes a space as the latter
        assert tokenizer.encode(text).ids == library.encode(text)


@lru_cache
def _small() -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    model = train_sentencepiece(600)
    return read_sentencepiece(model, "here")[0], sentencepiece.SentencePieceProcessor(model_proto=model)


def test_metas_directory_runs_from_text(llama: bytes, tmp_path: Path) -> None:
    """tokenizer.model and nothing else, to text in and text out; transformers reads what is made."""
    library = sentencepiece.SentencePieceProcessor(model_proto=llama)
    model = make_model(tmp_path / "hf", heads=8, hidden=48, ffn=128, vocab=800)
    model.lm_head.weight.data[3:259] = 0  # of single bytes, which random weights would make no characters of
    (write_meta(tmp_path / "meta", model, 2) / "tokenizer.model").write_bytes(llama)
    invoke(convert, "--source", tmp_path / "meta", "--out", tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "tokenizer.model").read_bytes() == llama
    theirs = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    for text in texts()[2:50]:
        ids = [1, *library.encode(text)]
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == library.decode(ids)
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token) == ("<s>", "</s>", "<unk>")
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out")
    arguments = ("--shards", tmp_path / "out", "--backend", "eager", "--max-new-tokens", 9, "--json", "-")
    found = json.loads(invoke(run, *arguments, "--prompt", "Once upon a time").stdout)
    prompt = [1, *library.encode("Once upon a time")]
    assert found["prompt_tokens"] == len(prompt)
    whole = library.decode(prompt + found["token_ids"][0])
    assert "Once upon a time" + found["text"][0] == whole


@pytest.mark.parametrize("direct", [False, True])
def test_a_hugging_face_directory(llama: bytes, direct: bool, tmp_path: Path) -> None:
    """Added tokens, BOS and EOS are as its small files say; by llama-quantize too. A tokenizer.json wins."""
    library = sentencepiece.SentencePieceProcessor(model_proto=llama)
    make_model(tmp_path / "hf", vocab=804)
    small = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_eos_token": True,
            "bos_token": "<s>",
        },
        "added_tokens.json": {"<pad>": 800, "<|turn|>": 801},
        "special_tokens_map.json": {"pad_token": "<pad>", "eos_token": {"content": "</s>", "lstrip": False}},
    }
    for name, content in small.items():
        (tmp_path / "hf" / name).write_text(json.dumps(content))
    (tmp_path / "hf" / "tokenizer.model").write_bytes(llama)
    if direct:
        invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "out")
    else:
        invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in texts()[2:40]:
        assert tokenizer.encode(text).ids == [1, *library.encode(text), 2]
    ids = tokenizer.encode("He said<|turn|>no<pad>").ids
    assert ids == [1, *library.encode("He said"), 801, *library.encode("no"), 800, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "He said<|turn|> no"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == small["tokenizer_config.json"]
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert open_source(tmp_path / "hf").auxiliary_files()["tokenizer.json"] == b"{}"


def test_no_space_before_the_text_where_that_is_said(llama: bytes, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", config=SMALL).joinpath("tokenizer.model").write_bytes(llama)
    edit_json(tmp_path / "hf" / "config.json", lambda fields: fields)
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"add_prefix_space": false, "add_bos_token": false}')
    tokenizer, _ = read_sentencepiece(llama, "here", prefix=False)
    assert tokenizer.encode("Hello").tokens[0][0] == "H"
    assert read_sentencepiece(llama, "here")[0].encode("Hello").tokens[0][0] == "\u2581"


# --- tiktoken


@pytest.mark.parametrize("since_3_1", [False, True])
def test_llama_3s_directory(since_3_1: bool, tmp_path: Path) -> None:
    tokens, _ = train_byte_level(LLAMA3)
    ranks = {as_bytes(token): rank for rank, token in enumerate(tokens)}
    library = tiktoken.Encoding("here", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
    model = make_model(tmp_path / "hf", heads=8, hidden=48, ffn=128, vocab=len(tokens) + 256)
    write_meta(tmp_path / "meta", model, 1, use_scaled_rope=since_3_1)
    (tmp_path / "meta" / "tokenizer.model").write_bytes(tiktoken_file(tokens))
    invoke(convert, "--source", tmp_path / "meta", "--out", tmp_path / "checkpoint")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    for text in texts()[1:]:
        ids = library.encode_ordinary(text)
        assert theirs.encode(text) == [len(tokens), *ids], text
        assert theirs.decode(ids) == text
    turn = theirs.encode("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>")
    user, rest = library.encode_ordinary("user"), library.encode_ordinary("\n\nHi")
    begin, header, end, eot = (len(tokens) + place for place in (0, 6, 7, 9))
    assert turn == [begin, header, *user, end, *rest, eot]
    assert theirs.eos_token == "<|end_of_text|>"
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out")
    arguments = ("--shards", tmp_path / "out", "--backend", "eager", "--max-new-tokens", 5, "--json", "-")
    found = json.loads(invoke(run, *arguments, "--prompt", "It was a fine day").stdout)
    assert found["prompt_tokens"] == 1 + len(library.encode_ordinary("It was a fine day"))


def test_special_tokens_of_llama_3() -> None:
    """256 each, of ids that the published tokenizer.json files give them."""
    for since_3_1, named in (
        (False, {"start_header_id": 6, "end_header_id": 7, "reserved_special_token_4": 8, "eot_id": 9}),
        (True, {"finetune_right_pad_id": 4, "reserved_special_token_2": 5, "eom_id": 8, "eot_id": 9, "python_tag": 10}),
    ):
        names = special_tokens(since_3_1)
        assert len(names) == len(set(names)) == 256
        assert names[:2] == ["<|begin_of_text|>", "<|end_of_text|>"]
        assert {name: names.index(f"<|{name}|>") for name in named} == named
        assert names[-1] == f"<|reserved_special_token_{247 if since_3_1 else 250}|>"


# --- GPT-2's files


def write_gpt2(directory: Path, **config: Any) -> tiktoken.Encoding:
    """OPT's tokenizer beside a model: its special tokens first. Returns tiktoken's reading of the same tokens."""
    tokens, merges = train_byte_level(GPT2)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *tokens])}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    fields = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>"}
    fields |= {
        "unk_token": {"__type": "AddedToken", "content": "</s>", "normalized": True},
        "pad_token": "<pad>",
    } | config
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    ranks = {as_bytes(token): len(special) + rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("here", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})


def test_opts_directory_runs_from_text(tmp_path: Path) -> None:
    make_opt(tmp_path / "hf", vocab=810)
    library = write_gpt2(tmp_path / "hf")
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "checkpoint")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "checkpoint"), tokenizer_of(tmp_path / "checkpoint")
    for text in texts():
        ids = library.encode_ordinary(text)
        assert ours.encode(text).ids == [2, *ids], text
        assert ours.decode(ids) == text
        assert theirs.encode(text) == [2, *ids]
    assert ours.encode("<pad>").ids == [2, 1]
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out")
    arguments = ("--shards", tmp_path / "out", "--backend", "eager", "--max-seq-len", 60, "--json", "-")
    found = json.loads(invoke(run, *arguments, "--max-new-tokens", 5, "--prompt", "It was a fine day").stdout)
    assert found["prompt_tokens"] == 1 + len(library.encode_ordinary("It was a fine day"))
    assert len(found["text"]) == 1


def test_files_that_do_not_say_how_text_is_cut(tmp_path: Path) -> None:
    """vocab.json and merges.txt of a LLaMA go along; only GPT-2's own kind is known to cut text as GPT-2 does."""
    make_model(tmp_path / "hf", vocab=810)
    write_gpt2(tmp_path / "hf", tokenizer_class="Qwen2Tokenizer")
    assert {"vocab.json", "merges.txt"} < set(open_source(tmp_path / "hf").auxiliary_files())
    assert "tokenizer.json" not in open_source(tmp_path / "hf").auxiliary_files()
    write_gpt2(tmp_path / "hf", tokenizer_class="GPT2TokenizerFast", add_bos_token=None)
    assert tokenizer_of(tmp_path / "hf").encode("a").ids[0] != 2


# --- refusals


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (b"", "not a readable SentencePiece model"),
        (b"\x0a\x0e a tokenizer", "ends within a field"),
        (b"\x0a\x02\x0a\x00" * 2, "gives tokens 0 and 1 the same text"),
        (b"\x0a\x06\x0a\x01a\x15\x00\x00", "ends within"),
        (b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f", "no finite score"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x03", "of kind 'word'"),
        (b"\x0a\x03\x0a\x01a\x12\x04\x18\x02\xc0\x01\x01", "ends within"),
        (b"\x0a\x03\x0a\x01a\x12\x05\x18\x02\xc0\x01\x01", "treats spaces"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x02\x1a\x03\x12\x01\x01", "table of replacements"),
        (b"\x0a\x03\x0a\x01\xff", "not a readable SentencePiece model"),
        (b"\x0f\x00", "unknown kind 7"),
        (b"\xff" * 11, "more than ten bytes"),
        (b"YQ== 0\nYg== 0\n", "line 2"),
        (b"YQ== 0\nYg== 2\n", "leaves out ranks"),
        (b"YQ== 0\nYg= 1\n", "damaged at line 2"),
        (b"YQ== 0\nYg== x\n", "damaged at line 2"),
        (b"YQ== 0\n" + b"YWFh" * 100 + b" 1\n", "more than 256 characters"),
        (tiktoken_file(("a",)), "257 tokens but 50 rows"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else None,
)
def test_a_model_that_is_refused(model: bytes, says: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf").joinpath("tokenizer.model").write_bytes(model)
    refuse_source(tmp_path, "tokenizer.model", says)


def test_a_model_of_more_tokens_than_embeddings(llama: bytes, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf").joinpath("tokenizer.model").write_bytes(llama)
    refuse_source(tmp_path, "800 tokens but 50 rows of embeddings")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", "[]", "holds no JSON object"),
        ("tokenizer_config.json", "{", "holds no JSON object"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"800": {"content": "<b>", "lstrip": 1}}}', "lstrip 1"),
        ("special_tokens_map.json", '{"eos_token": {"content": "</s>", "rstrip": "no"}}', "rstrip 'no'"),
        ("tokenizer_config.json", '{"legacy": "yes"}', "legacy"),
        ("added_tokens.json", '{"<a>": [800]}', "the id [800]"),
        ("added_tokens.json", '{"\\ud800": 800}', "half a pair"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": {"content": "<b>"}}}', "gives the id 3"),
        ("added_tokens.json", '{"<a>": 802}', "has no token 800"),
        ("added_tokens.json", '{"<a>": -1}', "the id -1"),
        ("added_tokens.json", '{"<a>": "1"}', "the id"),
        ("special_tokens_map.json", "nul", "holds no JSON object"),
    ],
)
def test_small_files_that_are_refused(llama: bytes, name: str, content: str, says: str, tmp_path: Path) -> None:
    make_model(tmp_path / "hf", vocab=810)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(llama)
    (tmp_path / "hf" / name).write_text(content)
    refuse_source(tmp_path, str(tmp_path / "hf"), says)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("vocab.json", "[]", "every token an id"),
        ("vocab.json", "{", "not valid JSON"),
        ("vocab.json", '{"a": 0, "b": 2}', "leaves out ids"),
        ("vocab.json", '{"a": 0, "b": "1"}', "every token an id"),
        ("vocab.json", '{"a": 0}', "merge 0"),
        ("merges.txt", "#version: 0.2\nq \u0416\n", "merge 0"),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": true}', "none is named"),
    ],
)
def test_gpt2_files_that_are_refused(name: str, content: str, says: str, tmp_path: Path) -> None:
    make_opt(tmp_path / "hf", vocab=810)
    write_gpt2(tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(content, "utf-8")
    refuse_source(tmp_path, str(tmp_path / "hf"), says)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """Any bytes changed, cut off or put in: an InputError or a tokenizer, and nothing else."""
    model = bytearray(_damaged()[data.draw(st.integers(0, 1))])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(model) - 1))
        model[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    model = bytes(model[: data.draw(st.integers(1, len(model)))]) if data.draw(st.booleans()) else bytes(model)
    with suppress(InputError):
        read_sentencepiece(model, "here")[0].encode("a text")
    with suppress(InputError):
        read_tiktoken(model, "here", since_3_1=True)


@lru_cache
def _damaged() -> tuple[bytes, bytes]:
    return train_sentencepiece(400), tiktoken_file(train_byte_level(LLAMA3, 300)[0])


def test_scaled_rope_tells_the_generation(tmp_path: Path) -> None:
    """A Hugging Face directory that has only Meta's tokenizer.model."""
    tokens = train_byte_level(LLAMA3)[0]
    write_hf(tmp_path / "hf")
    make_model(tmp_path / "hf", vocab=len(tokens) + 256)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(tiktoken_file(tokens))
    assert tokenizer_of(tmp_path / "hf").token_to_id("<|eom_id|>") is None
    scaling = scaling_to_hf(Llama3Scaling(8.0, 1.0, 4.0, 8192))
    edit_json(tmp_path / "hf" / "config.json", lambda fields: fields["rope_parameters"].update(scaling))
    assert tokenizer_of(tmp_path / "hf").token_to_id("<|eom_id|>") == len(tokens) + 8
