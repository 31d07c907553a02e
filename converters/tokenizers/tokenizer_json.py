"""Making a tokenizer.json, which llama-run and Hugging Face's libraries read, from a vocabulary of any source.

LLaMA and OPT models have two kinds: byte-level BPE, and SentencePiece with scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from converters.console.errors import BadTokenizer, InputError
from converters.tokenizers.pre_tokenizers import Cut

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

# Types of tokens, by their numbers in SentencePiece's format and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # SentencePiece writes a space as this
_LONGEST_PIECE = 256  # SentencePiece's default limit is 16; the search for merges takes quadratic time in it
_CONFIG_NAMES = (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token"))


@dataclass(frozen=True)
class Added:
    """A token that is found in a text before the rest is split, with the settings of tokenizers' AddedToken."""

    content: str
    special: bool = False
    lstrip: bool = False  # includes the white space before it
    rstrip: bool = False  # includes the white space after it
    single_word: bool = False  # not found within a word
    normalized: bool = False  # found in the text as normalized, not as given

    def token(self) -> AddedToken:
        from tokenizers import AddedToken

        return AddedToken(**vars(self))


@dataclass(frozen=True)
class Vocabulary:
    """Every token's text and type by id, and the ids of special tokens: bos, eos, eot, eom, unknown, padding.

    ``added`` are the tokens, by id, that the files beside a vocabulary describe. ``pieces`` are the ids of user-defined
    tokens that are found as SentencePiece finds them: in the text whose spaces are already marked. Raises BadTokenizer
    for a text that isn't valid Unicode, and for two tokens of the same text.
    """

    where: str  # the file, for errors
    tokens: Sequence[str]
    types: Sequence[int]
    ids: dict[str, int]
    added: Mapping[int, Added] = field(default_factory=dict)
    pieces: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        first: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            if not token.isascii() and any("\ud800" <= letter <= "\udfff" for letter in token):
                raise BadTokenizer(f"{self.where} gives token {i} an invalid text (half a pair of surrogates).")
            if first.setdefault(token, i) != i:
                raise BadTokenizer(f"{self.where} gives tokens {first[token]} and {i} the same text.")

    def check_size(self, vocab_size: int) -> None:
        """Raise BadTokenizer where there is no token, or one without a row of the embedding."""
        if not 1 <= len(self.tokens) <= vocab_size:
            raise BadTokenizer(f"{self.where} has {len(self.tokens)} tokens but {vocab_size} rows of embeddings.")

    def config(self) -> dict[str, Any]:
        """The fields of tokenizer_config.json for this vocabulary."""
        # With the generic class transformers uses tokenizer.json as it is and rebuilds nothing by model type.
        fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return fields | {field: self.tokens[self.ids[name]] for name, field in _CONFIG_NAMES if name in self.ids}


@dataclass(frozen=True)
class Normalization:
    """What SentencePiece does to a text before it looks for pieces.

    ``scheme`` says which parts of a text get a space where added tokens split it. "": every part, as SentencePiece does
    with any text that it is given. As transformers' fast tokenizers do, "first": only the first part, and "always":
    every part, in both cases unless it begins with a space already.
    """

    prefix: bool = True  # put a space before the text
    scheme: str = ""
    trims: bool = False  # remove spaces around the text, and make runs of spaces one
    charsmap: bytes = b""  # a compiled table of replacements, of Unicode's compatibility forms for example


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], cut: Cut) -> Tokenizer:
    """Byte-level BPE: ``merges`` with the best first, tokens written in GPT-2's characters for bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut.whole_words))
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_merges(lines: Iterable[str], vocab: dict[str, int], where: str) -> list[tuple[str, str]]:
    """Merges from lines of two tokens each. Raises BadTokenizer where the vocabulary lacks a token of a merge."""
    merges = []
    for rank, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise BadTokenizer(f"{where} joins tokens that its vocabulary lacks (merge {rank}).")
        merges.append((left, right))
    return merges


def sentencepiece(
    vocabulary: Vocabulary, scores: Sequence[float], normalization: Normalization, unigram: bool = False
) -> Tokenizer:
    """SentencePiece: BPE that joins the neighbours of the best score, or with ``unigram`` the most likely pieces.

    Raises BadTokenizer for a token that is too long, and for an invalid table of replacements.
    """
    from tokenizers import Tokenizer, models

    tokens, types, ids = vocabulary.tokens, vocabulary.types, vocabulary.ids
    if unigram:
        pairs = list(zip(tokens, scores, strict=True))
        tokenizer = Tokenizer(models.Unigram(pairs, ids.get("unknown"), byte_fallback=BYTE in types))
    else:
        normal = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=all_merges(normal, scores, vocabulary.where),
            unk_token=tokens[ids["unknown"]] if "unknown" in ids else None,
            fuse_unk=True,
            byte_fallback=BYTE in types,
            ignore_merges=bool(vocabulary.pieces),  # these are split off whole, and no merges lead to them
        )
        tokenizer = Tokenizer(model)
    try:
        _normalize(tokenizer, normalization)
        _cut(tokenizer, normalization, [tokens[i] for i in vocabulary.pieces])
    except Exception as error:  # the library raises Exception itself for an invalid charsmap
        raise BadTokenizer(f"{vocabulary.where} has an invalid table of replacements ({error}).") from None
    return tokenizer


def _normalize(tokenizer: Tokenizer, wanted: Normalization) -> None:
    from tokenizers import Regex, decoders, normalizers

    # In the normalizer, so that a text that begins with a space gets another one, as in SentencePiece.
    steps: list[Any] = [normalizers.Precompiled(wanted.charsmap)] if wanted.charsmap else []
    if wanted.trims:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if wanted.prefix and not wanted.scheme:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if wanted.prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _cut(tokenizer: Tokenizer, wanted: Normalization, pieces: Sequence[str]) -> None:
    """Set the steps on the normalized text: add the space, where not done yet, and split off user-defined pieces."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = []
    if wanted.prefix and wanted.scheme:
        steps.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme=wanted.scheme, split=False))
    if pieces:  # the longest that matches at a place
        pattern = "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if steps:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def all_merges(normal: dict[str, int], scores: Sequence[float], where: str) -> list[tuple[str, str]]:
    """The merges, with the best first, that are equivalent to ``scores`` by id; ``normal`` are the normal tokens' ids.

    SentencePiece joins the neighbours that give the piece of the highest score, so every way to split a piece into two
    pieces is a merge of that piece's rank. Control, byte and user-defined tokens never result from joining. Raises
    BadTokenizer for a piece of more than ``_LONGEST_PIECE`` characters.
    """
    if any(len(piece) > _LONGEST_PIECE for piece in normal):
        raise BadTokenizer(f"{where} has a token of more than {_LONGEST_PIECE} characters.")

    def cuts(piece: str) -> Iterator[tuple[str, str]]:
        for middle in range(1, len(piece)):
            if piece[:middle] in normal and piece[middle:] in normal:
                yield piece[:middle], piece[middle:]

    best_first = sorted(normal, key=lambda piece: -scores[normal[piece]])
    return [cut for piece in best_first for cut in cuts(piece)]


def add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Have control, user-defined and added tokens found before a text is split."""
    tokens, types, ids = vocabulary.tokens, vocabulary.types, vocabulary.ids
    special = {i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)}
    special |= {ids[name] for name in ("bos", "eos", "eot", "eom") if name in ids}
    own = special | {i for i, kind in enumerate(types) if kind == USER_DEFINED and i not in vocabulary.pieces}
    found = {i: Added(tokens[i], special=i in special) for i in sorted(own)} | dict(vocabulary.added)
    if tokenizer.normalizer is not None:  # it marks spaces, and added tokens contain plain spaces
        found = {i: replace(entry, normalized=False) for i, entry in found.items()}
    tokenizer.add_tokens([found[i].token() for i in sorted(found) if found[i].content])


def add_template(tokenizer: Tokenizer, vocabulary: Vocabulary, bos: bool, eos: bool) -> None:
    """Have BOS put before a text and EOS after it, where asked for. Raises InputError where that token is unknown."""
    from tokenizers import processors

    tokens, ids, wanted = vocabulary.tokens, vocabulary.ids, {"bos": bos, "eos": eos}
    for name in [name for name, on in wanted.items() if on and name not in ids]:
        raise InputError(
            f"add_{name}_token asks for a {name} token around the texts of {vocabulary.where}, and none is named. "
            f"Set it to false in tokenizer_config.json, or name the {name}_token there."
        )
    if not any(wanted.values()):
        return
    before, after = ([tokens[ids[name]]] if wanted[name] else [] for name in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(tokens[ids[name]], ids[name]) for name in wanted if wanted[name]],
    )
