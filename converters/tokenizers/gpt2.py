"""GPT-2's vocab.json and merges.txt, which OPT uses: the tokens and merges of byte-level BPE."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from converters.console.errors import BadTokenizer
from converters.tokenizers.pre_tokenizers import GPT2
from converters.tokenizers.tokenizer_json import NORMAL, Vocabulary, byte_level, read_merges

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_gpt2(
    vocab_json: bytes, merges_txt: bytes, where: str, prefix: bool | None = None
) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer that the two files of the folder ``where`` describe, and its vocabulary, without special tokens.

    With ``prefix``, a space is put before a text that doesn't begin with one. Raises BadTokenizer for damaged files.
    """
    from tokenizers import pre_tokenizers

    vocab = _vocab(vocab_json, f"{where}/vocab.json")
    tokens = sorted(vocab, key=vocab.__getitem__)
    vocabulary = Vocabulary(f"{where}/vocab.json", tokens, [NORMAL] * len(tokens), {})
    try:
        lines = merges_txt.decode().split("\n")
    except UnicodeDecodeError:
        raise BadTokenizer(f"{where}/merges.txt is not text in UTF-8.") from None
    # The first line may name the format's version. Only that one is skipped: "#" is also a character of merges.
    kept = lines[1:] if lines[0].startswith("#version") else lines
    merges = read_merges((line.rstrip("\r") for line in kept if line.strip()), vocab, f"{where}/merges.txt")
    tokenizer = byte_level(vocab, merges, GPT2)
    if prefix:  # this step also splits the text, by GPT-2's own pattern, after adding the space
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    return tokenizer, vocabulary


def _vocab(content: bytes, where: str) -> dict[str, int]:
    try:
        vocab = json.loads(content)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise BadTokenizer(f"{where} is not valid JSON.") from None
    if not isinstance(vocab, dict) or not vocab or any(type(i) is not int for i in vocab.values()):
        raise BadTokenizer(f"{where} doesn't give every token an id.")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise BadTokenizer(f"{where} leaves out ids, or gives one to two tokens.")
    return vocab
