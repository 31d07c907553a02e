"""Tokenizers out of GGUF metadata, against SentencePiece's and transformers' results and plain reference algorithms."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from converters.console.errors import InputError
from converters.console.notes import forget_notes, print_notes
from converters.model.families.hf_config import to_hf
from converters.sources.gguf.source import open_gguf
from converters.tokenizers.gguf_tokenizer import PRE_TOKENIZERS, Metadata, end_tokens, special_ids, tokenizer_files

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

TEXTS = [
    "",
    "Hello world",
    " leading",
    "trailing ",
    "two  three   four    spaces",
    "line\nbreak\n\n\n  and\ttab\r\n",
    "1 12 123 1234 3.14 1,000,000 x86_64 ٣٤ ½",
    "I'll don't we've SHE'S they're it'd O'Neill",
    'say "this", (that); [those]... {x}! <y>? $5+5=10^1 ~|`',
    "naïve café Ünder 日本語 русский ☃ \U0001f600\U0001f468\u200d\U0001f469 e\u0301",
    "\u2581 already marked\u00a0nbsp\u3000wide",
]

MODEL = {"general.architecture": "llama", "llama.context_length": 64}  # what else the metadata have of a model


def files(values: dict[str, Any], vocab_size: int | None = None) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the configuration that metadata give."""
    metadata = Metadata(Path("model.gguf"), {**MODEL, **values})
    made = tokenizer_files(metadata, vocab_size or len(values["tokenizer.ggml.tokens"]))
    assert sorted(made) == ["tokenizer.json", "tokenizer_config.json"]
    return Tokenizer.from_str(made["tokenizer.json"].decode()), json.loads(made["tokenizer_config.json"])


def save(values: dict[str, Any], folder: Path) -> Path:
    metadata = Metadata(Path("model.gguf"), {**MODEL, **values})
    for name, content in tokenizer_files(metadata, len(values["tokenizer.ggml.tokens"])).items():
        (folder / name).write_bytes(content)
    return folder


# --- a real model


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    source = open_gguf(smollm2_gguf)
    for name, content in source.auxiliary_files().items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(to_hf(source.config)))
    return folder


# Ids from the model's original tokenizer.
SMOLLM2_IDS = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    " Paris.\n\nThe answer is: 2": [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34],
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "\n": [198],
    "<|im_start|>user\n<|im_end|>": [1, 4093, 198, 2],
}


def test_smollm2_ids(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 49152
    for text, ids in SMOLLM2_IDS.items():
        assert tokenizer.encode(text).ids == ids, text
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_loads_smollm2s_directory(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    for text in [*SMOLLM2_IDS, *TEXTS]:
        assert tokenizer(text).input_ids == ours.encode(text).ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.decode([1, 19556, 2], skip_special_tokens=True) == "Hello"


# --- byte-level BPE

CORPUS = [
    *TEXTS,
    "the quick brown fox",
    "12345 678 90",
    "don't stop, won't stop!!",
    "    def f(x):\n        return x\n",
] * 3


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """The metadata of a small vocabulary whose merges also cross words and digits, so that every cut shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=sorted(alphabet), special_tokens=["<|end|>", "<|begin|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [token for token, _ in vocab] + ["<think>"],
        "tokenizer.ggml.token_type": [CONTROL, CONTROL] + [NORMAL] * (len(vocab) - 2) + [USER_DEFINED],
        "tokenizer.ggml.merges": [" ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }


def test_cuts_by_name() -> None:
    """What each rule does to digits, contractions, spaces and punctuation, written down by hand."""
    text = "I'LL don't 1234  x!?\n\n  y"
    expected = {
        "gpt-2": ["I", "'", "LL", " don", "'t", " 1234", " ", " x", "!?", "\n\n ", " y"],
        "smollm": ["I", "'", "LL", " don", "'t", " ", "1", "2", "3", "4", " ", " x", "!?", "\n\n ", " y"],
        "llama-bpe": ["I", "'LL", " don", "'t", " ", "123", "4", " ", " x", "!?\n\n", " ", " y"],
        "qwen2": ["I", "'LL", " don", "'t", " ", "1", "2", "3", "4", " ", " x", "!?\n\n", " ", " y"],
        "tekken": ["I", "'LL", " don", "'t", " ", "1", "2", "3", "4", " ", " x", "!?\n\n", " ", " y"],
        "default": ["I", "'", "LL", " don", "'", "t", " ", "123", "4", " ", " x", "!?", "\n\n ", " y"],
    }
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    for name, pieces in expected.items():
        tokenizer, _ = files({**plain_bytes(tokens), "tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": False})
        cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:stop] for _, (start, stop) in cut] == pieces, name


def plain_bytes(tokens: list[str]) -> dict[str, Any]:
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": []}


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "llama3", "qwen2", "tekken"])
def test_byte_level_equals_transformers_reading(byte_level: dict[str, Any], tmp_path: Path, pre: str) -> None:
    """transformers builds a tokenizer from the same GGUF metadata with its own code (it knows no digit rule)."""
    from transformers import AutoTokenizer

    values = {**byte_level, "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=write_gguf(tmp_path / "model.gguf", values).name)
    ours, _ = files(values)
    for text in [*TEXTS, "a <|end|> b", "x<think>y"]:
        text = text.replace("e\u0301", "\u00e9")  # the NFC rule of qwen2 is tested by itself
        assert ours.encode(text).ids == theirs(text).input_ids, (pre, text)


def write_gguf(path: Path, values: dict[str, Any]) -> Path:
    """A GGUF file of this metadata with one tensor, enough for transformers to make a tokenizer of."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"embedding_length": 32, "block_count": 1, "attention.head_count": 1, "context_length": 64}
    for key, value in {**{f"llama.{key}": size for key, size in sizes.items()}, **values}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kind = {bool: "add_bool", int: "add_uint32", str: "add_string"}[type(value)]
            getattr(writer, kind)(key, value)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merged(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding as its definition has it: join the neighbours of the lowest rank until none are left."""
    symbols = list(piece)
    while len(symbols) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_byte_level_merges_within_cuts_and_round_trips(byte_level: dict[str, Any], pre: str) -> None:
    values = {**byte_level, "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    tokenizer, _ = files(values)
    ids = {token: i for i, token in enumerate(values["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(values["tokenizer.ggml.merges"])}
    whole = PRE_TOKENIZERS[pre].whole_words
    for text in TEXTS:
        text = text.replace("e\u0301", "\u00e9")
        pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        expected = [ids[t] for piece in pieces for t in ([piece] if whole and piece in ids else merged(piece, ranks))]
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected) == text


def test_whole_words_skip_the_merges() -> None:
    """LLaMA 3's rule: a word that is a token is that token, though no merges lead to it."""
    values = plain_bytes([*sorted(pre_tokenizers.ByteLevel.alphabet()), "abc", "<s>"])
    for pre, count in (("llama-bpe", 1), ("gpt-2", 3)):
        change = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
        assert len(files({**values, **change})[0].encode("abc").ids) == count


def test_qwen2_normalizes() -> None:
    values = plain_bytes(sorted(pre_tokenizers.ByteLevel.alphabet())) | {"tokenizer.ggml.pre": "qwen2"}
    tokenizer, _ = files(values)
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


def test_bos_by_default_of_the_kind(byte_level: dict[str, Any]) -> None:
    for pre, flag, expected in (
        ("gpt-2", None, []),
        ("gpt-2", True, [1]),
        ("llama-bpe", None, [1]),
        ("llama-bpe", False, []),
    ):
        change = {"tokenizer.ggml.pre": pre} | ({} if flag is None else {"tokenizer.ggml.add_bos_token": flag})
        tokenizer, _ = files({**byte_level, **change})
        bare = tokenizer.encode("some text", add_special_tokens=False).ids
        assert tokenizer.encode("some text").ids == expected + bare
    both = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer, _ = files({**byte_level, **both})
    assert tokenizer.encode("some text").ids == [1, *bare, 0]


def test_control_and_user_defined_tokens(byte_level: dict[str, Any]) -> None:
    tokenizer, config = files({**byte_level, "tokenizer.ggml.pre": "gpt-2"})
    think = len(byte_level["tokenizer.ggml.tokens"]) - 1
    ids = tokenizer.encode("a<think><|end|>b").ids
    assert ids[1:3] == [think, 0]
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<think><|end|>b"
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
    assert special == {"<|begin|>", "<|end|>"}
    assert (config["bos_token"], config["eos_token"]) == ("<|begin|>", "<|end|>")
    assert tokenizer.get_vocab_size() == len(byte_level["tokenizer.ggml.tokens"])


# --- SentencePiece

# A vocabulary that SentencePiece 0.2.3 learned (BPE, byte_fallback, identity normalization, extra spaces kept); the
# scores of its pieces are 0, -1, -2, ... in this order. Ids by the same library.
PIECES = (  # noqa: SIM905
    "th ▁a ▁th ▁the at nd re ▁and no ▁s ▁at in ▁c ▁o ▁▁ ing ▁no ▁cat er he is ▁r ▁t ▁on ther ▁are ▁rat ▁then ▁thing "
    "ab ac ai as es fo le ll ur ▁e ▁m ▁w aid pac ree ▁he ▁is ▁to able four ▁all ▁ano ▁ate ▁end ▁ t a e h n r o s d i c "
    "g l w , ; b f m p u"
).split(" ")
SENTENCEPIECE_IDS = {
    "the cat sat on the mat": [263, 277, 269, 264, 283, 263, 299, 264],
    " the others": [313, 263, 273, 284, 321],
    "  then   three    spaces": [274, 287, 274, 262, 303, 274, 313, 269, 302, 293],
    "not at the\nend\tthere": [276, 314, 270, 263, 14, 316, 265, 13, 260, 316, 266],
    "Ünder 42 ☃": [313, 199, 160, 265, 278, 313, 56, 54, 313, 230, 156, 135],
    "aaaa thethe attthhh": [261, 315, 315, 315, 263, 260, 316, 270, 314, 260, 317, 317],
    "": [],
    "nothing, another; here": [276, 260, 275, 328, 310, 284, 329, 304, 266],
}


def sentencepiece(**change: Any) -> dict[str, Any]:
    """The metadata of that vocabulary; keyword ``add_bos_token=False`` sets tokenizer.ggml.add_bos_token."""
    tokens = ["<unk>", "<s>", "</s>", "<|user|>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 260 + [-float(rank) for rank in range(len(PIECES))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, USER_DEFINED] + [BYTE] * 256 + [NORMAL] * len(PIECES),
        **{f"tokenizer.ggml.{key}": value for key, value in change.items()},
    }


def by_score(text: str, prefix: bool = True) -> list[int]:
    """SentencePiece's BPE as its definition has it: join the neighbours that give the best-scored piece."""
    scores = {piece: -rank for rank, piece in enumerate(PIECES)}
    symbols = list((" " * prefix + text if text else "").replace(" ", "▁"))
    while True:
        joins = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not joins:
            break
        _, at = min(joins)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = {piece: 260 + rank for rank, piece in enumerate(PIECES)}
    return [i for s in symbols for i in ([ids[s]] if s in ids else [4 + byte for byte in s.encode()])]


def test_sentencepiece_ids() -> None:
    tokenizer, _ = files(sentencepiece(add_bos_token=False))
    for text, ids in SENTENCEPIECE_IDS.items():
        assert tokenizer.encode(text).ids == ids == by_score(text), text
        assert tokenizer.decode(ids) == text
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace("▁", " ")


@settings(max_examples=300, deadline=None)
@given(st.text("theandr  cgo▁,\n4é", max_size=30), st.booleans())
def test_sentencepiece_equals_its_definition(text: str, prefix: bool) -> None:
    tokenizer, _ = files(sentencepiece(add_bos_token=False, add_space_prefix=prefix))
    ids = by_score(text, prefix)
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_user_defined_tokens_that_hold_the_mark_of_a_space() -> None:
    """They stand for a space, within words too; <|user|>, without one, is found in the text as given."""
    values = sentencepiece(add_bos_token=False)
    for key, value in (("tokens", "at▁c"), ("scores", 0.0), ("token_type", USER_DEFINED)):
        values[f"tokenizer.ggml.{key}"].append(value)
    tokenizer, _ = files(values)
    last = len(values["tokenizer.ggml.tokens"]) - 1
    assert tokenizer.encode("the cat can").ids == [*by_score("the c"), last, *by_score("an", False)]
    assert tokenizer.encode("the cat sat").ids == by_score("the cat sat")
    assert tokenizer.encode("a<|user|>at c").ids == [*by_score("a"), 3, *by_score(" ", False), last]
    assert tokenizer.decode(tokenizer.encode("the cat can").ids) == "the cat can"


def test_scores_rank_the_pieces_whatever_their_ids() -> None:
    values = sentencepiece(add_bos_token=False)
    for key in ("tokens", "scores", "token_type"):
        column = values[f"tokenizer.ggml.{key}"]
        values[f"tokenizer.ggml.{key}"] = column[:260] + column[260:][::-1]
    tokenizer, _ = files(values)
    last = 259 + len(PIECES)
    for text, ids in SENTENCEPIECE_IDS.items():
        assert tokenizer.encode(text).ids == [i if i < 260 else last + 260 - i for i in ids]


def test_sentencepiece_puts_bos_first_by_default(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, config = files(sentencepiece())
    text, ids = next(iter(SENTENCEPIECE_IDS.items()))
    assert tokenizer.encode(text).ids == [1, *ids]
    assert tokenizer.decode([1, *ids]) == text
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    loaded = AutoTokenizer.from_pretrained(save(sentencepiece(), tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    beside_a_config = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SENTENCEPIECE_IDS, *TEXTS]:
        assert loaded(text).input_ids == tokenizer.encode(text).ids == beside_a_config(text).input_ids
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text.replace("▁", " ")


def test_special_tokens_never_come_of_merging() -> None:
    """Typed-out special tokens match whole; a control token's text is no result of joining pieces."""
    tokenizer, _ = files(sentencepiece(add_bos_token=False))
    assert tokenizer.encode("<|user|>the").ids == [3, 263]
    assert tokenizer.encode("the</s>").ids == [263, 2]
    values = sentencepiece(add_bos_token=False)
    values["tokenizer.ggml.token_type"][260 + PIECES.index("▁then")] = CONTROL
    values["tokenizer.ggml.token_type"][260 + PIECES.index("▁the")] = UNUSED
    merges = json.loads(files(values)[0].to_str())["model"]["merges"]
    assert not {"▁then", "▁the"} & {left + right for left, right in merges}


def test_unknown_characters_without_byte_tokens() -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "a"]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL],
    }
    tokenizer, _ = files(values)
    assert tokenizer.encode("a☃☃a").ids == [1, 3, 4, 0, 4]


def test_a_file_without_token_types() -> None:
    values = sentencepiece()
    del values["tokenizer.ggml.token_type"]
    values["tokenizer.ggml.eot_token_id"] = 3
    tokenizer, _ = files(values)
    assert tokenizer.encode("</s><|user|>").ids == [1, 2, 3]


# --- what goes with it, and refusals


def test_more_embeddings_than_tokens() -> None:
    tokenizer, _ = files(sentencepiece(), vocab_size=1000)
    assert tokenizer.get_vocab_size() == 260 + len(PIECES)


def test_no_tokenizer_gives_no_files() -> None:
    for values in ({}, {"tokenizer.ggml.model": "none"}, {"tokenizer.ggml.model": "no_vocab"}):
        assert tokenizer_files(Metadata(Path("model.gguf"), values), 10) == {}


def test_configuration() -> None:
    _, config = files({**sentencepiece(padding_token_id=2), "tokenizer.chat_template": "{{ messages }}"})
    assert config["chat_template"] == "{{ messages }}"
    assert config["model_max_length"] == 64
    assert config["pad_token"] == "</s>"
    assert "chat_template" not in files(sentencepiece())[1]


def test_special_ids() -> None:
    metadata = Metadata(Path("model.gguf"), {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 4})
    assert special_ids(metadata, 10) == {"eos": 3, "eot": 4}
    llama = Metadata(Path("model.gguf"), {"tokenizer.ggml.model": "llama", "tokenizer.ggml.eos_token_id": 3})
    assert special_ids(llama, 10) == {"bos": 1, "eos": 3, "unknown": 0}
    assert special_ids(llama, 4) == {"bos": 1, "eos": 3, "unknown": 0}
    assert special_ids(llama, 1) == {"unknown": 0}


ROLES = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "cls", "mask", "fim_pre", "prefix")
READ = ROLES[:6]


@pytest.mark.parametrize("value", [4294967295, -1, "tokens", 1 << 31])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ids_out_of_range_stand_for_none(
    kind: str, value: Any, byte_level: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """As without the key, with a note; rows of embeddings beyond the tokens make no id right."""
    base = sentencepiece() if kind == "llama" else {**byte_level, "tokenizer.ggml.pre": "llama-bpe"}
    tokens = len(base["tokenizer.ggml.tokens"])
    value = tokens if value == "tokens" else value
    for role in ROLES:
        key = f"tokenizer.ggml.{role}_token_id"
        without = MODEL | {name: given for name, given in base.items() if name != key}
        results = []
        for values in (without, {**without, key: value}):
            forget_notes()
            metadata = Metadata(Path("model.gguf"), values)
            results.append((tokenizer_files(metadata, tokens + 8), end_tokens(metadata, tokens + 8)))
        assert results[0] == results[1]
        print_notes()
        said = capsys.readouterr().err
        assert (f"Note: model.gguf gives {value} for {key}; its vocabulary has {tokens} tokens" in said) == (
            role in READ
        )
    forget_notes()


def test_ids_out_of_range_leave_the_end_of_texts(byte_level: dict[str, Any]) -> None:
    """SentencePiece's kind has ids by default, as in llama.cpp; of the other kind, tokens are known by their text."""
    bad = {f"tokenizer.ggml.{role}_token_id": 4294967295 for role in READ}
    sp = Metadata(Path("model.gguf"), sentencepiece() | bad)
    assert (special_ids(sp, 400), end_tokens(sp, 400)) == ({"bos": 1, "eos": 2, "unknown": 0}, (2,))
    bpe = Metadata(Path("model.gguf"), byte_level | bad)
    assert (special_ids(bpe, 2000), end_tokens(bpe, 2000)) == ({}, (0,))
    tokenizer, _ = files(sentencepiece() | bad)
    for text, ids in SENTENCEPIECE_IDS.items():
        assert tokenizer.encode(text).ids == [1, *ids]


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_a_token_around_texts_that_is_not_named(
    role: str, byte_level: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values = byte_level | {"tokenizer.ggml.pre": "gpt-2", f"tokenizer.ggml.add_{role}_token": True}
    assert len(files(values)[0].encode("a").ids) == 2
    forget_notes()
    assert len(files(values | {f"tokenizer.ggml.{role}_token_id": 4294967295})[0].encode("a").ids) == 1
    print_notes()
    assert f"puts a {role} token around texts but doesn't say which" in capsys.readouterr().err
    forget_notes()


BYTES = plain_bytes(sorted(pre_tokenizers.ByteLevel.alphabet())) | {"tokenizer.ggml.pre": "gpt-2"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (sentencepiece(model="bert"), "of kind 'bert'; this tool converts 'gpt2' and 'llama'"),
        ({**BYTES, "tokenizer.ggml.pre": "viking"}, "unknown rule 'viking'.*smollm.*gguf-new-metadata --pre-tokenizer"),
        ({**BYTES, "tokenizer.ggml.pre": None}, "doesn't say how its tokenizer cuts text.*llama-bpe"),
        ({**BYTES, "tokenizer.ggml.merges": ["a b"]}, "joins tokens that its vocabulary lacks .merge 0"),
        ({**BYTES, "tokenizer.ggml.merges": ["ab"]}, "joins tokens that its vocabulary lacks"),
        ({**BYTES, "tokenizer.ggml.merges": None}, "lacks the metadata key tokenizer.ggml.merges"),
        ({**BYTES, "tokenizer.ggml.merges": "a b"}, "merges; it must be an array"),
        ({**BYTES, "tokenizer.ggml.add_bos_token": 1}, "it must be true or false"),
        (sentencepiece(tokens=["a", "b", "a"]), "gives tokens 0 and 2 the same text"),
        (sentencepiece(tokens=[]), "0 tokens"),
        (sentencepiece(tokens=[1, 2]), "values of the wrong type in tokenizer.ggml.tokens"),
        (sentencepiece(tokens=["x" * 300, "b", "c"], scores=[0.0] * 3, token_type=[1] * 3), "more than 256 characters"),
        (sentencepiece(scores=[0.0]), "1 values in tokenizer.ggml.scores for 335 tokens"),
        (sentencepiece(token_type=[1, 2]), "2 values in tokenizer.ggml.token_type"),
        (sentencepiece(eos_token_id="x"), "it must be a whole number"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    present = {**MODEL, **{key: value for key, value in values.items() if value is not None}}
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_files(Metadata(Path("model.gguf"), present), 400)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_embeddings() -> None:
    metadata = Metadata(Path("model.gguf"), sentencepiece())
    with pytest.raises(InputError, match="335 tokens but 300 rows of embeddings"):
        tokenizer_files(metadata, 300)
