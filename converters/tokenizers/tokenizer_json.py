"""A tokenizer.json, which llama-run and Hugging Face's libraries read, from a vocabulary, whatever file that is in.

Two kinds go with LLaMA and OPT models: byte-level BPE, and SentencePiece with scores.
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

# What a token is, in the numbers of SentencePiece's format and of GGUF's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"  # SentencePiece writes a space as this
_LONGEST_PIECE = 256  # SentencePiece's own limit is 16 by default; the search for merges is quadratic in it
_CONFIG_NAMES = (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token"))


@dataclass(frozen=True)
class Added:
    """A token that is found in a text before the rest is cut, with the settings that tokenizers' AddedToken has."""

    content: str
    special: bool = False
    lstrip: bool = False  # it takes the white space before it along
    rstrip: bool = False  # and that after it
    single_word: bool = False  # not found within a word
    normalized: bool = False  # found in the text as normalized, not as given

    def token(self) -> AddedToken:
        from tokenizers import AddedToken

        return AddedToken(**vars(self))


@dataclass(frozen=True)
class Vocabulary:
    """Every token's text and type by id, and the ids of special tokens: bos, eos, eot, eom, unknown, padding.

    ``added`` are the settings of tokens, by id, that the files beside a vocabulary name; ``pieces`` those of its
    user-defined tokens that are found where SentencePiece finds them: in the text whose spaces are marked.
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
                raise BadTokenizer(f"{self.where} gives token {i} a text that is none (half a pair).")
            if first.setdefault(token, i) != i:
                raise BadTokenizer(f"{self.where} gives tokens {first[token]} and {i} the same text.")

    def check_size(self, vocab_size: int) -> None:
        """Raise InputError where there is no token, or one without a row of the embedding."""
        if not 1 <= len(self.tokens) <= vocab_size:
            raise BadTokenizer(f"{self.where} has {len(self.tokens)} tokens but {vocab_size} rows of embeddings.")

    def config(self) -> dict[str, Any]:
        """What tokenizer_config.json has to say of it."""
        # The generic class: transformers then takes tokenizer.json as it is and rebuilds nothing by model type.
        fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return fields | {field: self.tokens[self.ids[name]] for name, field in _CONFIG_NAMES if name in self.ids}


@dataclass(frozen=True)
class Normalization:
    """What SentencePiece does to a text before it looks for pieces.

    ``scheme`` is for a text that added tokens cut into stretches. "": each gets its own space before it, as
    SentencePiece gives one to any text that it is handed. "first": only the first stretch, and "always": each, but
    none that begins with a space already; so transformers' fast tokenizers do.
    """

    prefix: bool = True  # a space before it
    scheme: str = ""
    trims: bool = False  # spaces around it dropped, runs of them inside made one
    charsmap: bytes = b""  # a compiled table of replacements (Unicode's compatibility forms, say)


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], cut: Cut) -> Tokenizer:
    """Byte-level BPE: ``merges`` best first, tokens in the letters that stand for bytes (GPT-2's)."""
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
    """Merges from lines of two tokens each. Raises InputError for one of tokens that the vocabulary lacks."""
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
    """SentencePiece: BPE that joins the neighbours of the best score, or with ``unigram`` the likeliest cutting."""
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
            ignore_merges=bool(vocabulary.pieces),  # these are cut out whole, and no merges lead to them
        )
        tokenizer = Tokenizer(model)
    try:
        _normalize(tokenizer, normalization)
        _cut(tokenizer, normalization, [tokens[i] for i in vocabulary.pieces])
    except Exception as error:  # plain Exception is what the library raises for a charsmap that is none
        raise BadTokenizer(f"{vocabulary.where} has a table of replacements that is none ({error}).") from None
    return tokenizer


def _normalize(tokenizer: Tokenizer, wanted: Normalization) -> None:
    from tokenizers import Regex, decoders, normalizers

    # As normalizer and not as pre-tokenizer: a text that starts with a space gets another one, as in SentencePiece.
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
    """What is done to the normalized text: the space before it, if not done yet, and user-defined pieces cut out."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = []
    if wanted.prefix and wanted.scheme:
        steps.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme=wanted.scheme, split=False))
    if pieces:  # the longest that stands at a place
        pattern = "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if steps:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def all_merges(normal: dict[str, int], scores: Sequence[float], where: str) -> list[tuple[str, str]]:
    """The merges, best first, that a vocabulary with scores (by id) stands for.

    SentencePiece joins whichever neighbours give the piece of the highest score, so every way to cut a piece into two
    pieces is a merge of that piece's rank; control, byte and user-defined tokens never come of joining. Raises
    InputError for a piece that is longer than any tokenizer's.
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
    """Have control and user-defined tokens, and those that are added by name, found before a text is cut."""
    tokens, types, ids = vocabulary.tokens, vocabulary.types, vocabulary.ids
    special = {i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)}
    special |= {ids[name] for name in ("bos", "eos", "eot", "eom") if name in ids}
    own = special | {i for i, kind in enumerate(types) if kind == USER_DEFINED and i not in vocabulary.pieces}
    found = {i: Added(tokens[i], special=i in special) for i in sorted(own)} | dict(vocabulary.added)
    if tokenizer.normalizer is not None:  # it marks spaces, and what is added speaks of spaces as they are
        found = {i: replace(entry, normalized=False) for i, entry in found.items()}
    tokenizer.add_tokens([found[i].token() for i in sorted(found) if found[i].content])


def add_template(tokenizer: Tokenizer, vocabulary: Vocabulary, bos: bool, eos: bool) -> None:
    """Have BOS put before a text and EOS after it, where that is asked for."""
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
