"""The tokenizer beside the shards: text to ids and back, and damaged files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from converters.console.errors import InputError
from runtime.run.text import find_codec


def _write(folder: Path) -> Path:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(sorted(alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_text_survives(tmp_path: Path) -> None:
    _write(tmp_path)
    codec = find_codec(tmp_path, 1000)
    for text in ("Hello, world", "two  spaces\n", "é 漢字 🙂"):
        ids = codec.encode(text)
        assert codec.continuation([], ids) == text
        for cut in range(len(ids)):  # also within a character, which then belongs to the continuation
            before = codec.continuation([], ids[:cut]).rstrip("\ufffd")
            assert before + codec.continuation(ids[:cut], ids[cut:]) == text


def test_the_space_before_the_first_word_is_kept(tmp_path: Path) -> None:
    """Where a tokenizer in the manner of SentencePiece takes one from the beginning of a text."""
    words = ["\u2581a", "\u2581girl", "\u2581named", "\u2581Emma"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = find_codec(tmp_path, 1000)
    assert "a girl named" + codec.continuation(codec.encode("a girl named"), [3]) == "a girl named Emma"


def test_no_tokenizer_and_no_token(tmp_path: Path) -> None:
    assert find_codec(tmp_path, 1000) is None
    _write(tmp_path)
    with pytest.raises(InputError, match="no token"):
        find_codec(tmp_path, 1000).encode("")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (os.fsdecode(b"caf\xe9"), "holds the byte 0xE9, which is no character of UTF-8"),
        ("\ud83d", "holds half a character in UTF-8"),
        ("a\udfff", "holds half a character"),
    ],
    ids=ascii,
)
def test_a_prompt_that_is_no_text(prompt: str, says: str, tmp_path: Path) -> None:
    """Latin-1 under a UTF-8 locale, as the shell hands it over; and half of what UTF-16 has in two."""
    _write(tmp_path)
    with pytest.raises(InputError, match=f"{says}.*iconv"):
        find_codec(tmp_path, 1000).encode(prompt)


def test_a_prompt_with_a_nul(tmp_path: Path) -> None:
    _write(tmp_path)
    assert find_codec(tmp_path, 1000).continuation([], find_codec(tmp_path, 1000).encode("a\0b")) == "a\0b"


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    _write(tmp_path).rename(folder / "tokenizer.json")
    assert find_codec(folder, 1000).encode("a")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"\x00" * 100])
def test_damaged_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        find_codec(tmp_path, 1000)
