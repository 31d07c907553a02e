"""Tokenizers trained on a novel in the public domain by the libraries that define their formats: for tests."""

from __future__ import annotations

import base64
import io
import json
import sys
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

# As LLaMA 1 and 2's tokenizer was trained, but for its size.
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
}
TEXTS = [
    "",
    " ",
    "Hello world",
    " leading",
    "trailing ",
    "two  three   four    spaces",
    "line\nbreak\n\n\n  and\ttab\r\n",
    "1 12 123 1234 3.14 1,000,000 x86_64 ٣٤ ½",
    "I'll don't we've SHE'S they're it'd O'Neill",
    'say "this", (that); [those]... {x}! <y>? $5+5=10^1 ~|`',
    "naïve café Ünder 日本語 русский ☃ \U0001f600\U0001f468\u200d\U0001f469 e\u0301",
    "\u00a0nbsp\u3000wide ﬁ ①",
]


@lru_cache
def novel() -> tuple[str, ...]:
    """The lines of Botchan, from the sources of sentencepiece that the Makefile fetches."""
    [archive] = (Path(sys.prefix) / "texts").glob("sentencepiece-*.tar.gz")
    with tarfile.open(archive) as content:
        [member] = [name for name in content.getnames() if name.endswith("/test/botchan.txt")]
        return tuple(content.extractfile(member).read().decode("utf-8-sig").splitlines())


def train_sentencepiece(vocab_size: int = 800, **options: Any) -> bytes:
    """A tokenizer.model; LLaMA's kind where ``options`` of SentencePiece's trainer say nothing else."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(novel()), model_writer=out, vocab_size=vocab_size, minloglevel=2, **(LLAMA | options)
    )
    return out.getvalue()


@lru_cache
def train_byte_level(pattern: str, vocab_size: int = 800) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Byte-level BPE: the tokens by id, in the letters that stand for bytes, and the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(novel(), trainer)
    vocab = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tuple(sorted(vocab, key=vocab.__getitem__)), tuple(tuple(merge) for merge in merges)


def as_bytes(token: str) -> bytes:
    """A token of byte-level BPE as the bytes that its letters stand for."""
    return bytes(_BYTES[letter] for letter in token)


def _byte_of_each_letter() -> dict[str, int]:
    """By what the library makes of every byte that can stand in a text; the rest follow in order (GPT-2's rule)."""
    kept = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) not in " \u00a0\u00ad"]
    rest = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTES = _byte_of_each_letter()


def tiktoken_file(tokens: tuple[str, ...]) -> bytes:
    """Tokens in the order of their ranks as tiktoken's file of them."""
    return b"".join(base64.b64encode(as_bytes(token)) + b" %d\n" % rank for rank, token in enumerate(tokens))
