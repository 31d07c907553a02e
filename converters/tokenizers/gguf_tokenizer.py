"""The tokenizer in a GGUF file, as tokenizer.json and tokenizer_config.json for Hugging Face's libraries.

LLaMA models have two kinds: byte-level BPE ("gpt2") and SentencePiece BPE with scores ("llama"). What the metadata
doesn't say (defaults, patterns, which tokens match whole) is as in llama.cpp, the program that defines the format.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from converters.console.errors import BadTokenizer, InputError, advising
from converters.console.notes import note
from converters.formats.gguf_header import Metadata
from converters.model.end_tokens import ends_by_text, is_surely_control, union
from converters.tokenizers.pre_tokenizers import PRE_TOKENIZERS, Cut
from converters.tokenizers.tokenizer_json import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Normalization,
    Vocabulary,
    add_template,
    add_tokens,
    byte_level,
    read_merges,
    sentencepiece,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)  # never a part of ordinary text
# The ids that a SentencePiece vocabulary has unless the file says otherwise.
_LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}

_ADVICE = (
    "Give another file of the model, or convert it without a tokenizer, from a copy: gguf-new-metadata "
    "--remove-metadata tokenizer.ggml.model INPUT OUTPUT."
)


def special_ids(metadata: Metadata, vocab_size: int) -> dict[str, int]:
    """The ids of special tokens by their GGUF names: bos, eos, eot, eom, unknown, padding; missing ones are left out.

    An id outside the vocabulary is ignored with a note: converters write -1 (also as 4294967295) for a model without
    such a token. As in llama.cpp, the default of the tokenizer's kind then applies.
    """
    tokens = metadata.array("tokenizer.ggml.tokens", (str,), default=None)
    count = vocab_size if tokens is None else min(len(tokens), vocab_size)
    defaults = _LLAMA_IDS if metadata.text("tokenizer.ggml.model", None) == "llama" else {}
    ids = {name: i for name, i in defaults.items() if i < count}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = metadata.whole(key, None)
        if value is None:
            continue
        if 0 <= value < count:
            ids[name] = value
        else:
            instead = f"its default, {ids[name]}, holds" if name in ids else "the model is taken to have none"
            note(f"{metadata.path} gives {value} for {key}; its vocabulary has {count} tokens: {instead}.")
    return ids


def end_tokens(metadata: Metadata, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text: those that the file names, and control tokens recognized by their text."""
    named = special_ids(metadata, vocab_size)
    ends = union(named[name] for name in ("eos", "eot", "eom") if name in named)
    tokens = metadata.array("tokenizer.ggml.tokens", (str,), default=None) or []
    kinds = _types(metadata, tokens)[:vocab_size]
    control = {i: tokens[i] for i, kind in enumerate(kinds) if kind in _WHOLE}
    more = [i for i in ends_by_text(control) if i not in ends]
    if more:
        listed = ", ".join(f"{tokens[i]} ({i})" for i in more)
        note(f"Taken for end tokens by their text, without being listed as such in {metadata.path}: {listed}.")
    return union(ends, more)


def tokenizer_files(metadata: Metadata, vocab_size: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, file name -> content; empty where the file holds no tokenizer.

    Raises InputError for a kind of tokenizer that is not converted, and for a vocabulary that contradicts itself.
    """
    with advising(_ADVICE):
        return _make(metadata, vocab_size)


def _make(metadata: Metadata, vocab_size: int) -> dict[str, bytes]:
    kind = metadata.text("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise BadTokenizer(f"{metadata.path} has a tokenizer of kind {kind!r}; this tool converts 'gpt2' and 'llama'.")
    vocabulary = _vocabulary(metadata, vocab_size)
    if kind == "gpt2":
        cut = _cut(metadata)
        tokenizer, add_bos = _byte_level(metadata, vocabulary, cut), cut.add_bos
    else:
        # They contain the mark of a space, so they are only found once spaces are marked.
        marked = (
            i for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] == USER_DEFINED and SPACE in token
        )
        vocabulary = replace(vocabulary, pieces=frozenset(marked))
        tokenizer, add_bos = _sentencepiece(metadata, vocabulary), True
    add_tokens(tokenizer, vocabulary)
    around = {"bos": add_bos, "eos": False}
    wanted = {name: metadata.flag(f"tokenizer.ggml.add_{name}_token", on) for name, on in around.items()}
    for name in [name for name, on in wanted.items() if on and name not in vocabulary.ids]:
        note(f"{metadata.path} puts a {name} token around texts but doesn't say which it is: none is put there.")
        wanted[name] = False
    add_template(tokenizer, vocabulary, **wanted)
    config = _tokenizer_config(metadata, vocabulary)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _vocabulary(metadata: Metadata, vocab_size: int) -> Vocabulary:
    tokens = metadata.array("tokenizer.ggml.tokens", (str,))
    vocabulary = Vocabulary(str(metadata.path), tokens, [NORMAL] * len(tokens), special_ids(metadata, vocab_size))
    vocabulary.check_size(vocab_size)
    return replace(vocabulary, types=_types(metadata, tokens))


def _types(metadata: Metadata, tokens: list[str]) -> list[int]:
    """The type of each token; one that surely ends a text is a control token, whatever the file calls it."""
    types = metadata.array("tokenizer.ggml.token_type", (int,), len(tokens), default=None) or [NORMAL] * len(tokens)
    return [CONTROL if is_surely_control(token) else kind for token, kind in zip(tokens, types, strict=True)]


def _cut(metadata: Metadata) -> Cut:
    name = metadata.text("tokenizer.ggml.pre", None)
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    problem = "doesn't say how its tokenizer cuts text" if name is None else f"cuts text by the unknown rule {name!r}"
    raise InputError(
        f"{metadata.path} {problem} (tokenizer.ggml.pre); known: {', '.join(PRE_TOKENIZERS)}. If one of these is "
        "right, set it in a copy: gguf-new-metadata --pre-tokenizer NAME INPUT OUTPUT."
    )


def _byte_level(metadata: Metadata, vocabulary: Vocabulary, cut: Cut) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = read_merges(metadata.array("tokenizer.ggml.merges", (str,)), vocab, vocabulary.where)
    return byte_level(vocab, merges, cut)


def _sentencepiece(metadata: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    scores = metadata.array("tokenizer.ggml.scores", (float, int), len(vocabulary.tokens))
    return sentencepiece(vocabulary, scores, Normalization(metadata.flag("tokenizer.ggml.add_space_prefix", True)))


def _tokenizer_config(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    config = vocabulary.config() | {"model_max_length": metadata.whole(metadata.key("context_length"))}
    template = metadata.text("tokenizer.chat_template", None)
    return config if template is None else config | {"chat_template": template}
