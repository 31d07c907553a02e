"""How text is split before byte-level BPE, by GGUF's names; patterns as in llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """Text is split by each pattern in turn, within the pieces that the previous one made."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is itself a token isn't merged
    add_bos: bool = False  # unless the file says otherwise
    nfc: bool = False


WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = Cut((WORDS,))
LLAMA3 = Cut((_CL100K % "{1,3}",), whole_words=True, add_bos=True)
SINGLE_DIGIT = r"\p{N}"
_SINGLE_DIGITS = Cut((SINGLE_DIGIT, WORDS))

# tokenizer.ggml.pre -> the rule that it names. An unknown name is refused: with another rule some token ids would be
# wrong, and nothing would show it.
PRE_TOKENIZERS = {
    "default": Cut((r"[\p{P}$+<=>^~|]+", WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "falcon3": LLAMA3,
    "qwen2": Cut((_CL100K % "",), nfc=True),
    "tekken": Cut((_TEKKEN,), whole_words=True, add_bos=True),
}
