"""The tokenizer inside a GGUF file, as the tokenizer.json and tokenizer_config.json that Hugging Face's libraries read.

Two kinds go with LLaMA models: byte-level BPE ("gpt2") and SentencePiece BPE with scores ("llama"). What the metadata
leaves unsaid (defaults, patterns, which tokens match whole) is as in llama.cpp, the program that defines the format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.errors import InputError
from converters.gguf_header import Metadata

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"  # SentencePiece writes a space as this
_LONGEST_PIECE = 256  # SentencePiece's own limit is 16 by default; the search for merges is quadratic in it


@dataclass(frozen=True)
class _PreTokenizer:
    """How text is cut before byte-level BPE: by each pattern in turn, within the pieces that the last one left."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token as it stands skips the merges
    add_bos: bool = False  # where the file doesn't say
    nfc: bool = False


_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = _PreTokenizer((_WORDS,))
_SINGLE_DIGITS = _PreTokenizer((r"\p{N}", _WORDS))
_LLAMA3 = _PreTokenizer((_CL100K % "{1,3}",), whole_words=True, add_bos=True)

# tokenizer.ggml.pre -> the cutting that it names. A name that is not here is refused: with another cutting the token
# ids are wrong here and there, and nothing shows it.
PRE_TOKENIZERS = {
    "default": _PreTokenizer((r"[\p{P}$+<=>^~|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _PreTokenizer((_CL100K % "",), nfc=True),
    "tekken": _PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
}

# The ids that a SentencePiece vocabulary has unless the file says otherwise.
_LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def special_ids(metadata: Metadata, vocab_size: int) -> dict[str, int]:
    """The ids of special tokens by their GGUF names: bos, eos, eot, eom, unknown, padding; absent ones left out.

    Raises InputError for an id outside the vocabulary.
    """
    defaults = _LLAMA_IDS if metadata.text("tokenizer.ggml.model", None) == "llama" else {}
    ids = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = metadata.whole(key, defaults.get(name))
        if value is None:
            continue
        if not 0 <= value < vocab_size:
            raise InputError(f"{metadata.path} gives {value} for {key}; its vocabulary has {vocab_size} tokens.")
        ids[name] = value
    return ids


def tokenizer_files(metadata: Metadata, vocab_size: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, by file name; nothing where the file holds no tokenizer.

    Raises InputError for a kind of tokenizer that is not converted, and for a vocabulary that contradicts itself.
    """
    kind = metadata.text("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{metadata.path} has a tokenizer of kind {kind!r}; this tool converts 'gpt2' and 'llama'.")
    tokens, types = _vocabulary(metadata, vocab_size)
    ids = {name: i for name, i in special_ids(metadata, vocab_size).items() if i < len(tokens)}
    if kind == "gpt2":
        pre = _pre_tokenizer(metadata)
        tokenizer, add_bos = _byte_level(metadata, tokens, pre), pre.add_bos
    else:
        tokenizer, add_bos = _sentencepiece(metadata, tokens, types, ids), True
    _add_tokens(tokenizer, tokens, types, ids)
    _add_template(tokenizer, metadata, tokens, ids, add_bos)
    config = _tokenizer_config(metadata, tokens, ids)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _vocabulary(metadata: Metadata, vocab_size: int) -> tuple[list[str], list[int]]:
    """Every token's text and type, by id."""
    tokens = metadata.array("tokenizer.ggml.tokens", (str,))
    if not 1 <= len(tokens) <= vocab_size:
        raise InputError(
            f"{metadata.path} has {len(tokens)} tokens but {vocab_size} rows of embeddings; fetch it again."
        )
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if first.setdefault(token, i) != i:
            raise InputError(f"{metadata.path} gives tokens {first[token]} and {i} the same text; fetch it again.")
    types = metadata.array("tokenizer.ggml.token_type", (int,), len(tokens), default=None)
    return tokens, types or [_NORMAL] * len(tokens)


def _pre_tokenizer(metadata: Metadata) -> _PreTokenizer:
    name = metadata.text("tokenizer.ggml.pre", None)
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    problem = "doesn't say how its tokenizer cuts text" if name is None else f"cuts text by the unknown rule {name!r}"
    raise InputError(
        f"{metadata.path} {problem} (tokenizer.ggml.pre); known: {', '.join(PRE_TOKENIZERS)}. If one of these is "
        "right, set it in a copy: gguf-new-metadata --pre-tokenizer NAME INPUT OUTPUT."
    )


def _byte_level(metadata: Metadata, tokens: list[str], pre: _PreTokenizer) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for rank, merge in enumerate(metadata.array("tokenizer.ggml.merges", (str,))):
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise InputError(f"{metadata.path} joins tokens that its vocabulary lacks (merge {rank}); fetch it again.")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Metadata, tokens: list[str], types: list[int], ids: dict[str, int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.array("tokenizer.ggml.scores", (float, int), len(tokens))
    normal = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    if any(len(token) > _LONGEST_PIECE for token in normal):
        raise InputError(f"{metadata.path} has a token of more than {_LONGEST_PIECE} characters; fetch it again.")
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=_merges(normal, scores),
        unk_token=tokens[ids["unknown"]] if "unknown" in ids else None,
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    tokenizer = Tokenizer(model)
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    # As normalizer and not as pre-tokenizer: a text that starts with a space gets another one, as in SentencePiece.
    start = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(normal: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges, best first, that a vocabulary with scores stands for.

    SentencePiece joins whichever neighbours give the piece of the highest score, so every way to cut a piece into two
    pieces is a merge of that piece's rank; control, byte and user-defined tokens never come of joining.
    """

    def cuts(piece: str) -> Iterator[tuple[str, str]]:
        for middle in range(1, len(piece)):
            if piece[:middle] in normal and piece[middle:] in normal:
                yield piece[:middle], piece[middle:]

    best_first = sorted(normal, key=lambda piece: -scores[normal[piece]])
    return [cut for piece in best_first for cut in cuts(piece)]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], ids: dict[str, int]) -> None:
    """Have control and user-defined tokens matched whole in the text, before anything else is done to it."""
    from tokenizers import AddedToken

    special = {i for i, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL)}
    special |= {ids[name] for name in ("bos", "eos", "eot", "eom") if name in ids}
    whole = [i for i, token in enumerate(tokens) if token and (i in special or types[i] == _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False, special=i in special) for i in whole])


def _add_template(
    tokenizer: Tokenizer, metadata: Metadata, tokens: list[str], ids: dict[str, int], add_bos: bool
) -> None:
    """Have BOS put before a text and EOS after it, where the file or its kind's default asks for that."""
    from tokenizers import processors

    wanted = {
        "bos": metadata.flag("tokenizer.ggml.add_bos_token", add_bos),
        "eos": metadata.flag("tokenizer.ggml.add_eos_token", False),
    }
    for name in [name for name, on in wanted.items() if on and name not in ids]:
        raise InputError(f"{metadata.path} asks for a {name} token around texts but names none; fetch it again.")
    if not any(wanted.values()):
        return
    before, after = ([tokens[ids[name]]] if wanted[name] else [] for name in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(tokens[ids[name]], ids[name]) for name in wanted if wanted[name]],
    )


def _tokenizer_config(metadata: Metadata, tokens: list[str], ids: dict[str, int]) -> dict[str, Any]:
    # The generic class: transformers then takes tokenizer.json as it is and rebuilds nothing by model type.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, field in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        if name in ids:
            config[field] = tokens[ids[name]]
    config["model_max_length"] = metadata.whole("llama.context_length")
    template = metadata.text("tokenizer.chat_template", None)
    if template is not None:
        config["chat_template"] = template
    return config
