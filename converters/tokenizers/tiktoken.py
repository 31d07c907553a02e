"""Meta's tokenizer.model for LLaMA 3, in tiktoken's format: per token a line with its bytes in base64 and its rank.

It doesn't contain the special tokens. Their ids follow the ranks, and their names are in Meta's reference code
(https://github.com/meta-llama/llama-models, llama3/api/tokenizer.py; before 3.1 llama3/llama/tokenizer.py).
"""

from __future__ import annotations

import base64
import binascii
import re
from itertools import chain
from typing import TYPE_CHECKING

from converters.console.errors import BadTokenizer
from converters.tokenizers.pre_tokenizers import LLAMA3
from converters.tokenizers.tokenizer_json import CONTROL, NORMAL, Vocabulary, all_merges, byte_level

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_SPECIAL_TOKENS = 256
_RESERVED = "reserved_special_token_{}"
_BEGIN = ("begin_of_text", "end_of_text", _RESERVED.format(0), _RESERVED.format(1))
# Names in 3.0 and in 3.1; reserved ones fill the remaining places.
_NAMES_3_0 = (*_BEGIN, _RESERVED.format(2), _RESERVED.format(3), "start_header_id", "end_header_id",
              _RESERVED.format(4), "eot_id")  # fmt: skip
_NAMES_3_1 = (*_BEGIN, "finetune_right_pad_id", _RESERVED.format(2), "start_header_id", "end_header_id",
              "eom_id", "eot_id", "python_tag")  # fmt: skip
_MOST_TOKENS = 1 << 20


def is_tiktoken(content: bytes) -> bool:
    """Whether a tokenizer.model is in this format."""
    return _FIRST_LINE.match(content) is not None


def read_tiktoken(content: bytes, where: str, since_3_1: bool) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer that a tokenizer.model describes, without special tokens yet, and its vocabulary.

    ``since_3_1`` selects the special tokens' names. Raises BadTokenizer for a damaged file.
    """
    letters = _letters()
    base = ["".join(letters[byte] for byte in token) for token in _tokens(content, where)]
    names = special_tokens(since_3_1)
    tokens, first = [*base, *names], len(base)
    ids = {
        "bos": first,
        "eos": first + 1,
        "eot": tokens.index("<|eot_id|>"),
        **({"eom": tokens.index("<|eom_id|>"), "padding": first + 4} if since_3_1 else {}),
    }
    vocabulary = Vocabulary(where, tokens, [NORMAL] * len(base) + [CONTROL] * len(names), ids)
    ranks = {token: rank for rank, token in enumerate(base)}
    # tiktoken always joins the neighbours that give the token of the lowest rank.
    merges = all_merges(ranks, [-rank for rank in range(len(base))], where)
    return byte_level({token: i for i, token in enumerate(tokens)}, merges, LLAMA3), vocabulary


def special_tokens(since_3_1: bool) -> list[str]:
    """The special tokens in the order of their ids."""
    names = list(_NAMES_3_1 if since_3_1 else _NAMES_3_0)
    reserved = sum(name.startswith("reserved") for name in names)
    names += [_RESERVED.format(reserved + place) for place in range(_SPECIAL_TOKENS - len(names))]
    return [f"<|{name}|>" for name in names]


def _tokens(content: bytes, where: str) -> list[bytes]:
    """The tokens by rank."""
    by_rank: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        text, _, rank = line.partition(b" ")
        try:
            token, place = base64.b64decode(text, validate=True), int(rank)
        except (binascii.Error, ValueError):
            raise BadTokenizer(f"{where} is damaged at line {number}.") from None
        if not token or place in by_rank or not 0 <= place < _MOST_TOKENS:
            raise BadTokenizer(f"{where} has an empty token, or one of a rank that is taken, at line {number}.")
        by_rank[place] = token
    if sorted(by_rank) != list(range(len(by_rank))):
        raise BadTokenizer(f"{where} leaves out ranks between 0 and {max(by_rank)}.")
    return [by_rank[rank] for rank in range(len(by_rank))]


def _letters() -> list[str]:
    """The character that stands for each byte in byte-level BPE, as in GPT-2: the byte's own where printable."""
    printable = set(chain(range(ord("!"), ord("~") + 1), range(ord("¡"), ord("¬") + 1), range(ord("®"), ord("ÿ") + 1)))
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
