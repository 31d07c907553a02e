"""SentencePiece's tokenizer.model, which LLaMA 1 and 2 use: the pieces, and how text is normalized.

It is a Protocol Buffers message, described in sentencepiece_model.proto of https://github.com/google/sentencepiece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from converters.console.errors import BadTokenizer, InputError
from converters.formats.protobuf import read_fields, read_float
from converters.tokenizers.tokenizer_json import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Normalization,
    Vocabulary,
    sentencepiece,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_KINDS = {_UNIGRAM: "unigram", _BPE: "BPE", 3: "word", 4: "char"}


@dataclass
class _Trainer:
    """Fields of TrainerSpec, with its defaults. An id of -1 means that there is no such token."""

    model_type: int = _UNIGRAM
    treat_whitespace_as_suffix: int = 0
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1


_TRAINER_FIELDS = {
    3: "model_type",
    24: "treat_whitespace_as_suffix",
    40: "unk_id",
    41: "bos_id",
    42: "eos_id",
    43: "pad_id",
}


@dataclass
class _Normalizer:
    """Fields of NormalizerSpec, with its defaults."""

    precompiled_charsmap: bytes = b""
    add_dummy_prefix: int = 1
    remove_extra_whitespaces: int = 1
    escape_whitespaces: int = 1


_NORMALIZER_FIELDS = {
    2: "precompiled_charsmap",
    3: "add_dummy_prefix",
    4: "remove_extra_whitespaces",
    5: "escape_whitespaces",
}


@dataclass
class _Model:
    """A ModelProto: pieces by id, and the two specs."""

    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    trainer: _Trainer = field(default_factory=_Trainer)
    normalizer: _Normalizer = field(default_factory=_Normalizer)


def read_sentencepiece(
    content: bytes, where: str, prefix: bool | None = None, scheme: str = ""
) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer that a tokenizer.model describes, without special tokens yet, and its vocabulary.

    ``prefix`` overrides its setting for a space before the text; ``scheme`` is Normalization's. Raises BadTokenizer for
    a damaged file, and InputError for a kind of model that is not converted.
    """
    try:
        model = _read(content)
    except ValueError as error:
        raise BadTokenizer(f"{where} is not a readable SentencePiece model ({error}).") from None
    trainer, normalizer = model.trainer, model.normalizer
    if trainer.model_type not in (_UNIGRAM, _BPE):
        kind = _KINDS.get(trainer.model_type, trainer.model_type)
        raise InputError(
            f"{where} is a SentencePiece model of kind {kind!r}; this tool converts 'BPE' and 'unigram'. "
            "Convert from a directory that has a tokenizer.json."
        )
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise InputError(
            f"{where} treats spaces in a way that is not converted (treat_whitespace_as_suffix, or no "
            "escape_whitespaces). Convert from a directory that has a tokenizer.json."
        )
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unknown": trainer.unk_id, "padding": trainer.pad_id}
    present = {
        name: i for name, i in ids.items() if 0 <= i < len(model.tokens) and model.types[i] in (CONTROL, UNKNOWN)
    }
    pieces = frozenset(i for i, kind in enumerate(model.types) if kind == USER_DEFINED and model.tokens[i])
    vocabulary = Vocabulary(where, model.tokens, model.types, present, pieces=pieces)
    normalization = Normalization(
        prefix=bool(normalizer.add_dummy_prefix) if prefix is None else prefix,
        scheme=scheme,
        trims=bool(normalizer.remove_extra_whitespaces),
        charsmap=normalizer.precompiled_charsmap,
    )
    return sentencepiece(vocabulary, model.scores, normalization, trainer.model_type == _UNIGRAM), vocabulary


def read_pieces(content: bytes, where: str) -> list[tuple[str, float, int]]:
    """Text, score and type of each piece of a tokenizer.model, by id. Raises BadTokenizer for a damaged file."""
    try:
        model = _read(content)
    except ValueError as error:
        raise BadTokenizer(f"{where} is not a readable SentencePiece model ({error}).") from None
    return list(zip(model.tokens, model.scores, model.types, strict=True))


def _read(content: bytes) -> _Model:
    """Raises ValueError where ``content`` is not a valid ModelProto."""
    model = _Model()
    for number, value in read_fields(content):
        if number == _PIECES:
            _read_piece(_message(value), model)
        elif number == _TRAINER:
            _fill(model.trainer, _message(value), _TRAINER_FIELDS)
        elif number == _NORMALIZER:
            _fill(model.normalizer, _message(value), _NORMALIZER_FIELDS)
    if not model.tokens:
        raise ValueError("it has no pieces")
    return model


def _read_piece(message: bytes, model: _Model) -> None:
    token, score, kind = "", 0.0, NORMAL
    for number, value in read_fields(message):
        if number == 1:
            token = _message(value).decode()
        elif number == 2:
            score = read_float(value)
        elif number == 3 and isinstance(value, int):
            kind = value
    if not math.isfinite(score):
        raise ValueError(f"piece {len(model.tokens)} has no finite score")
    model.tokens.append(token)
    model.scores.append(score)
    model.types.append(kind)


def _fill(spec: _Trainer | _Normalizer, message: bytes, names: dict[int, str]) -> None:
    for number, value in read_fields(message):
        name = names.get(number)
        if name is None:
            continue
        if type(value) is not type(getattr(spec, name)):
            raise ValueError(f"{name} is of the wrong type")
        setattr(spec, name, value)


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where a text or a message should")
    return value
