"""Prompts become the ids that transformers' AutoTokenizer gives, whatever the files beside a vocabulary set."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import transformers.convert_slow_tokenizer
from invoke import invoke
from models import SMALL, make_opt, write_hf
from test_tokenizers import GPT2, LLAMA3, write_gpt2
from tokenizer_models import tiktoken_file, train_byte_level, train_sentencepiece
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from converters.cli import command as convert
from converters.console.notes import forget_notes, print_notes
from converters.sources.opening import open_source
from converters.tokenizers.auxiliary_files import read_auxiliary_files
from converters.tokenizers.reader import read_tokenizer
from runtime.run.text import find_codec

GENERIC, LLAMA = "PreTrainedTokenizerFast", "LlamaTokenizer"
ROWS = 810
MODEL = replace(SMALL, vocab_size=ROWS)
# A token, added under settings of which every one shows in one of the texts.
NEW = "<w>"
TEXTS = [
    "Hello world",
    " leading",
    f"one {NEW} two",
    f"one{NEW}two",
    f"{NEW}one",
    f"one{NEW}",
    f"  {NEW}  ",
    f"{NEW}{NEW} {NEW}",
    f"one\t{NEW}\n two",
    "one </s> two</s>three <s> </s>",
    f"{NEW.upper()} and _{NEW}_ and 5{NEW}5",
]
FLAGS = [
    {},
    {"lstrip": True},
    {"rstrip": True},
    {"lstrip": True, "rstrip": True},
    {"single_word": True},
    {"normalized": True},
    {"normalized": False},
    {"special": True},
    {"special": True, "normalized": True, "rstrip": True},
]
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def write(directory: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))


def reader(directory: Path) -> Tokenizer:
    """The tokenizer of what llama-convert writes of a source, as llama-run reads it again."""
    return read_tokenizer(open_source(directory).auxiliary_files(), "here", ROWS)[0]


def check(directory: Path, texts: list[str] = TEXTS) -> None:
    ours, theirs = reader(directory), AutoTokenizer.from_pretrained(directory)
    for text in texts:
        found = ours.encode(text).ids
        assert found == theirs(text).input_ids, (text, theirs.convert_ids_to_tokens(found))


def added(at: int, flags: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": more | {"added_tokens_decoder": {str(at): PLAIN | {"content": NEW} | flags}}}


# --- a tokenizer.json, which goes before all but added_tokens_decoder


@lru_cache
def saved(post: bool = True) -> str:
    """A byte-level tokenizer.json of 800 tokens, with two added ones and BOS before a text and EOS behind it."""
    tokens, merges = train_byte_level(GPT2)
    tokens = ["<s>", "</s>", *tokens[:-2]]
    vocab = {token: i for i, token in enumerate(tokens)}
    known = [pair for pair in merges if {*pair, "".join(pair)} <= vocab.keys()]
    tokenizer = Tokenizer(models.BPE(vocab, known))
    tokenizer.normalizer = normalizers.Lowercase()  # so that a token is found in the one text or in the other
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tokenizer.to_str()


def write_saved(directory: Path, content: str, files: dict[str, Any]) -> Path:
    write_hf(directory, config=MODEL)
    (directory / "tokenizer.json").write_text(content)
    config = {"tokenizer_class": GENERIC} | files.get("tokenizer_config.json", {})
    write(directory, files | {"tokenizer_config.json": config})
    return directory


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("place", ["decoder", "decoder of an own token", "pad_token", "special_tokens_map", "extra"])
def test_tokens_added_to_a_tokenizer_json(place: str, flags: dict[str, Any], tmp_path: Path) -> None:
    entry = PLAIN | {"content": NEW} | flags
    files = {
        "decoder": added(800, flags),
        "decoder of an own token": {
            "tokenizer_config.json": {"added_tokens_decoder": {"1": entry | {"content": "</s>"}}}
        },
        "pad_token": {"tokenizer_config.json": {"pad_token": entry | {"__type": "AddedToken"}}},
        "special_tokens_map": {"special_tokens_map.json": {"pad_token": entry}},
        "extra": {"tokenizer_config.json": {"additional_special_tokens": [entry | {"__type": "AddedToken"}]}},
    }[place]
    check(write_saved(tmp_path / "hf", saved(), files))


@pytest.mark.parametrize(
    "files",
    [
        # settings that are not said
        {"tokenizer_config.json": {"added_tokens_decoder": {"800": {"content": NEW}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"800": {"content": NEW, "special": True}}}},
        {"tokenizer_config.json": {"pad_token": {"__type": "AddedToken", "content": NEW}}},
        {"tokenizer_config.json": {"mask_token": {"__type": "AddedToken", "content": NEW}}},
        {"tokenizer_config.json": {"additional_special_tokens": [{"__type": "AddedToken", "content": NEW}]}},
        {"special_tokens_map.json": {"pad_token": {"content": NEW}}},
        {"added_tokens.json": {NEW: 800}},
        {"added_tokens.json": {NEW: 800}, "special_tokens_map.json": {"pad_token": NEW}},
        {"added_tokens.json": {NEW: 800}, "tokenizer_config.json": {"added_tokens_decoder": {}}},
        {"tokenizer_config.json": {"pad_token": NEW, "eos_token": "</s>"}},
        {"tokenizer_config.json": {"image_token": NEW}},
        {"tokenizer_config.json": {"extra_special_tokens": [NEW]}},
        {"tokenizer_config.json": {"split_special_tokens": True}},
        {"tokenizer_config.json": {"add_bos_token": False, "add_eos_token": False, "bos_token": "<s>"}},
        {"special_tokens_map.json": {"eos_token": {"content": "</s>", "rstrip": True, "lstrip": True}}},
        # the order in which new ones get their ids
        {"tokenizer_config.json": {"mask_token": "<m>", "pad_token": NEW, "sep_token": "<sep>", "cls_token": "5"}},
        # special_tokens_map.json counts for nothing beside added_tokens_decoder
        {
            "special_tokens_map.json": {"pad_token": NEW},
            "tokenizer_config.json": {"added_tokens_decoder": {"0": PLAIN | {"content": "<s>", "special": True}}},
        },
    ],
    ids=str,
)
def test_small_files_beside_a_tokenizer_json(files: dict[str, Any], tmp_path: Path) -> None:
    check(write_saved(tmp_path / "hf", saved(), files))


@pytest.mark.parametrize("place", ["tokenizer.json", "added_tokens_decoder"])
def test_a_token_that_is_named_is_special(place: str, tmp_path: Path) -> None:
    """Whatever the other file says of it: left out of texts, and found or not as split_special_tokens has it."""
    tokenizer = Tokenizer.from_str(saved())
    tokenizer.add_tokens([NEW])
    config: dict[str, Any] = {"eos_token": NEW}
    if place == "added_tokens_decoder":
        config["added_tokens_decoder"] = {"800": PLAIN | {"content": NEW, "special": False}}
    for split in (False, True):
        files = {"tokenizer_config.json": config | {"split_special_tokens": split}}
        directory = write_saved(tmp_path / str(split), tokenizer.to_str(), files)
        check(directory)
        theirs = AutoTokenizer.from_pretrained(directory)
        assert reader(directory).decode([5, 800, 6]) == theirs.decode([5, 800, 6], skip_special_tokens=True)
    assert 800 in find_codec(tmp_path / "False", ROWS).control_tokens()


@pytest.mark.parametrize("kind", [GENERIC, "LlamaTokenizerFast"])
@pytest.mark.parametrize("normalized", [(True, False), (False, True), (True, True)], ids=str)
def test_added_tokens_decoder_beside_a_tokenizer_json_that_marks_spaces(
    kind: str, normalized: tuple[bool, bool], tmp_path: Path
) -> None:
    """As in older repositories of LLaMA's: tokenizer.json and added_tokens_decoder differ in where a token is found."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "\u2581a", "a", "b", "<", "s", ">"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("\u2581", "a")], unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens([AddedToken(text, normalized=normalized[0]) for text in pieces[:3]])
    decoder = {str(i): PLAIN | {"content": pieces[i], "special": True, "normalized": normalized[1]} for i in range(3)}
    config = {"tokenizer_class": kind, "bos_token": "<s>", "added_tokens_decoder": decoder}
    if kind != GENERIC:  # of this class transformers 5 makes the cutting of text anew
        config |= {"unk_token": "<unk>", "eos_token": "</s>"}
    directory = write_saved(tmp_path / "hf", tokenizer.to_str(), {"tokenizer_config.json": config})
    if kind == GENERIC:
        check(directory, ["a<s>b", "<s>a", "a <s> b</s>", "b"])
    else:
        found = {entry.content: entry.normalized for entry in reader(directory).get_added_tokens_decoder().values()}
        assert found == dict.fromkeys(pieces[:3], normalized[1])


@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("add_bos", [True, False, None])
def test_only_the_post_processor_puts_tokens_around_a_text(post: bool, add_bos: bool | None, tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if add_bos is None else {"add_bos_token": add_bos})
    check(write_saved(tmp_path / "hf", saved(post), {"tokenizer_config.json": config}))
    assert (reader(tmp_path / "hf").encode("Hello").ids[0] == 0) == post


@pytest.mark.parametrize("side", ["left", "right"])
def test_saved_truncation_and_padding_touch_no_prompt(side: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(saved())
    tokenizer.enable_truncation(4, direction=side)
    tokenizer.enable_padding(direction=side, length=64, pad_id=1)
    write_saved(tmp_path / "hf", tokenizer.to_str(), {})
    check(tmp_path / "hf")
    codec = find_codec(tmp_path / "hf", ROWS)
    assert (
        codec.encode("a longer text than four tokens")
        == Tokenizer.from_str(saved()).encode("a longer text than four tokens").ids
    )


def test_a_token_beyond_the_embedding_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """AutoTokenizer gives it an id that the model has no row for."""
    write_saved(tmp_path / "hf", saved(), {"tokenizer_config.json": {"pad_token": NEW}})
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").pad_token_id == 800
    forget_notes()
    codec = find_codec(tmp_path / "hf", 800)
    assert max(codec.encode(f"one{NEW}two")) < 800
    print_notes()
    assert f"Note: The prompt holds '{NEW}'" in capsys.readouterr().err
    forget_notes()


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {NEW: 800}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"800": {"content": NEW}}}},
        {"special_tokens_map.json": {"pad_token": NEW}},
    ],
    ids=str,
)
def test_a_made_tokenizer_leaves_out_what_has_no_row(files: dict[str, Any], tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", config=replace(MODEL, vocab_size=800))
    (tmp_path / "hf" / "tokenizer.model").write_bytes(train_sentencepiece())
    write(tmp_path / "hf", files)
    said = invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out").stderr
    assert f"adds the token '{NEW}' beyond the model's 800 rows of embeddings" in said
    assert max(find_codec(tmp_path / "out", 800).encode(f"one{NEW}two")) < 800


# --- made of GPT-2's files, and of LLaMA 3's


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_tokens_added_to_gpt2s_files(flags: dict[str, Any], tmp_path: Path) -> None:
    make_opt(tmp_path, vocab=ROWS)
    write_gpt2(tmp_path)
    write(tmp_path, added(804, flags, **json.loads((tmp_path / "tokenizer_config.json").read_text())))
    check(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"add_prefix_space": True},
        {"add_prefix_space": False},
        {"add_prefix_space": True, "added_tokens_decoder": {"804": PLAIN | {"content": NEW}}},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"pad_token": {"__type": "AddedToken", "content": "<pad>", **PLAIN, "rstrip": True}},
        {"mask_token": {"__type": "AddedToken", "content": NEW, **PLAIN, "lstrip": True}},
        {"additional_special_tokens": [NEW]},
    ],
    ids=str,
)
def test_settings_of_gpt2s_files(config: dict[str, Any], tmp_path: Path) -> None:
    make_opt(tmp_path, vocab=ROWS)
    write_gpt2(tmp_path, **config)
    check(tmp_path, [*TEXTS, "one <pad> two<pad>", "It's 12 o'clock,  \n isn't it"])


@pytest.mark.parametrize("files", [{"added_tokens.json": {NEW: 804}}, {"special_tokens_map.json": {"pad_token": NEW}}])
def test_small_files_beside_gpt2s(files: dict[str, Any], tmp_path: Path) -> None:
    make_opt(tmp_path, vocab=ROWS)
    write_gpt2(tmp_path)
    write(tmp_path, files)
    check(tmp_path)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_tokens_added_to_llama_3s_file(flags: dict[str, Any], tmp_path: Path) -> None:
    """AutoTokenizer knows LLaMA 3's own special tokens only where added_tokens_decoder names them."""
    tokens, _ = train_byte_level(LLAMA3, 540)
    write_hf(tmp_path, config=MODEL)
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_file(tokens))
    own = {str(540 + i): PLAIN | {"content": text, "special": True} for i, text in enumerate(read_llama_3_names())}
    entry = PLAIN | {"content": NEW} | flags
    config = {"tokenizer_class": GENERIC, "add_bos_token": False, "added_tokens_decoder": own | {"796": entry}}
    write(tmp_path, {"tokenizer_config.json": config})
    check(tmp_path, [*TEXTS, "one<|eot_id|> two <|eot_id|>"])


def read_llama_3_names() -> list[str]:
    from converters.tokenizers.tiktoken import special_tokens

    return special_tokens(since_3_1=False)


# --- made of SentencePiece's model


@pytest.fixture
def protobuf(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads a tokenizer.model by protobuf. This stands in for it, by what the library sentencepiece tells
    of the model and by OPTIONS, which it was trained with."""

    class ModelProto:
        def ParseFromString(self, content: bytes) -> None:
            library = sentencepiece.SentencePieceProcessor(model_proto=content)
            texts = [library.id_to_piece(i) for i in range(len(library))]
            self.pieces = [
                SimpleNamespace(piece=text, score=library.get_score(i), type=_kind(library, i, text))
                for i, text in enumerate(texts)
            ]
            ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "unk_piece": "<unk>", "bos_piece": "<s>", "eos_piece": "</s>"}
            self.trainer_spec = SimpleNamespace(model_type=2, byte_fallback=True, **ids)
            self.normalizer_spec = SimpleNamespace(
                precompiled_charsmap=b"", add_dummy_prefix=True, remove_extra_whitespaces=False, escape_whitespaces=True
            )

    module = transformers.convert_slow_tokenizer
    monkeypatch.setattr(module, "requires_backends", lambda *_: None)
    monkeypatch.setattr(module, "import_protobuf", lambda *_, **__: SimpleNamespace(ModelProto=ModelProto))


def _kind(library: sentencepiece.SentencePieceProcessor, i: int, text: str) -> int:
    kinds = {
        2: library.is_unknown(i),
        3: library.is_control(i),
        4: text in PIECES,
        5: library.is_unused(i),
        6: library.is_byte(i),
    }
    return next((kind for kind, found in kinds.items() if found), 1)


# User-defined pieces: without the mark of a space, with it before, within, behind and alone, and one in another.
PIECES = ["<sep>", "\u2581foo", "lo\u2581wo", "end\u2581", "\u2581\u2581\u2581", "<sep>\u2581<sep>", "zq"]
PIECE_TEXTS = [
    "a<sep>b",
    "a <sep> b",
    "<sep>",
    "<sep>b<sep> <sep>c",
    "foo and foo",
    "xfoo x foo",
    "hello world, hello  world",
    "the end of an end",
    "bend it, end",
    "a   b      c    d",
    "zqzq azqb zq",
    "</s>foo </s> foo<sep>foo",
    "lo\u2581wo",
]


@lru_cache
def trained(pieces: bool) -> bytes:
    return train_sentencepiece(user_defined_symbols=PIECES) if pieces else train_sentencepiece()


def write_sentencepiece(directory: Path, config: dict[str, Any], files: dict[str, Any], pieces: bool = False) -> Path:
    write_hf(directory, config=MODEL)
    (directory / "tokenizer.model").write_bytes(trained(pieces))
    write(directory, files | {"tokenizer_config.json": config | files.get("tokenizer_config.json", {})})
    return directory


@pytest.mark.parametrize("kind", [GENERIC, LLAMA])
@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.usefixtures("protobuf")
def test_tokens_added_to_sentencepiece(kind: str, legacy: bool | None, flags: dict[str, Any], tmp_path: Path) -> None:
    """By LLaMA's class transformers 5 isn't legacy unless that is said, and doubles no space; else SentencePiece's way
    is the rule. transformers 4 was legacy wherever nothing was said."""
    config = {"tokenizer_class": kind, "add_bos_token": False} | ({} if legacy is None else {"legacy": legacy})
    check(write_sentencepiece(tmp_path, config, added(800, flags)))


@pytest.mark.parametrize("kind", [GENERIC, LLAMA])
@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {NEW: 800}},
        {"added_tokens.json": {NEW: 800}, "special_tokens_map.json": {"pad_token": NEW}},
        {"special_tokens_map.json": {"pad_token": PLAIN | {"content": NEW, "rstrip": True}}},
        {"tokenizer_config.json": {"pad_token": NEW, "additional_special_tokens": [NEW, "<x>"]}},
        {"tokenizer_config.json": {"add_bos_token": True, "bos_token": "<s>"}},
        {"tokenizer_config.json": {"add_bos_token": True, "add_eos_token": True}},
        {
            "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "<s>", "add_eos_token": True},
            "special_tokens_map.json": {"eos_token": "</s>"},
        },
    ],
    ids=str,
)
@pytest.mark.usefixtures("protobuf")
def test_small_files_beside_sentencepiece(kind: str, files: dict[str, Any], tmp_path: Path) -> None:
    check(write_sentencepiece(tmp_path, {"tokenizer_class": kind, "add_bos_token": False}, files))


@pytest.mark.usefixtures("protobuf")
def test_no_space_before_a_text(tmp_path: Path) -> None:
    """Of the two classes LLaMA's alone heeds it."""
    config = {"tokenizer_class": LLAMA, "add_bos_token": False, "add_prefix_space": False}
    check(write_sentencepiece(tmp_path, config, added(800, {})))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.usefixtures("protobuf")
def test_user_defined_pieces(legacy: bool, tmp_path: Path) -> None:
    """Found as SentencePiece finds them. LLaMA's class in transformers misses those that hold the mark of a space."""
    config = {"tokenizer_class": GENERIC, "add_bos_token": False, "legacy": legacy}
    check(write_sentencepiece(tmp_path, config, {}, pieces=True), [*PIECE_TEXTS, *TEXTS])


@pytest.mark.parametrize("kind", [GENERIC, LLAMA])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_user_defined_pieces_as_the_library_finds_them(kind: str, model_type: str, tmp_path: Path) -> None:
    write_hf(tmp_path, config=MODEL)
    model = train_sentencepiece(user_defined_symbols=PIECES, model_type=model_type)
    (tmp_path / "tokenizer.model").write_bytes(model)
    write(tmp_path, {"tokenizer_config.json": {"tokenizer_class": kind, "add_bos_token": False}})
    library, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model), reader(tmp_path)
    for text in PIECE_TEXTS:
        if "</s>" not in text:  # which the library takes for text
            assert tokenizer.encode(text).ids == library.encode(text), text


def test_what_is_read_is_what_is_beside_the_weights(tmp_path: Path) -> None:
    """llama-run reads the same files from the shards as from the checkpoint."""
    write_saved(tmp_path / "hf", saved(), added(800, {"rstrip": True}))
    assert read_auxiliary_files(tmp_path / "hf").keys() >= {"tokenizer.json", "tokenizer_config.json"}
    codec = find_codec(tmp_path / "hf", ROWS)
    assert [codec.encode(text) for text in TEXTS] == [reader(tmp_path / "hf").encode(text).ids for text in TEXTS]
