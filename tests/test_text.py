"""The tokenizer beside the shards: text to ids and back, and damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from converters.errors import InputError
from runtime.text import find_codec


def _write(folder: Path) -> Path:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(sorted(alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_text_survives(tmp_path: Path) -> None:
    _write(tmp_path)
    codec = find_codec(tmp_path)
    for text in ("Hello, world", "two  spaces\n", "é 漢字 🙂"):
        assert codec.decode(codec.encode(text)) == text


def test_no_tokenizer_and_no_token(tmp_path: Path) -> None:
    assert find_codec(tmp_path) is None
    _write(tmp_path)
    with pytest.raises(InputError, match="no token"):
        find_codec(tmp_path).encode("")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"\x00" * 100])
def test_damaged_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        find_codec(tmp_path)
