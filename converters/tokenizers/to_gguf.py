"""A tokenizer as GGUF's metadata, for llama.cpp: from the files that llama-run reads it from.

llama.cpp has byte-level BPE with rules for cutting text that it knows by name ("gpt2"), and SentencePiece's BPE by
scores ("llama"). Unigram vocabularies and other rules are refused: with them some ids would be wrong, and nothing would
show it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.console.errors import BadTokenizer, InputError, advising, shown
from converters.console.notes import note
from converters.formats.gguf_header import Metadata
from converters.model.config import ModelConfig
from converters.model.end_tokens import all_ends, ends_by_text
from converters.tokenizers.gguf_tokenizer import tokenizer_files
from converters.tokenizers.pre_tokenizers import PRE_TOKENIZERS, SINGLE_DIGIT, WORDS, Cut
from converters.tokenizers.reader import MODEL, TOKENIZER, read_tokenizer
from converters.tokenizers.sentencepiece import read_pieces
from converters.tokenizers.settings import CONFIG, read_settings
from converters.tokenizers.tiktoken import is_tiktoken
from converters.tokenizers.tokenizer_json import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_KEY = "tokenizer.ggml."
_WHERE = "the source"
_ADVICE = "To write the model without a tokenizer, take tokenizer.json away from a copy of the source."
# Texts by which the result is held against the tokenizer it was made from.
_SAMPLES = (
    "Hello world",
    "The year 1984, pi is 3.14159; x_1 += 0x7f",
    "I'll don't SHE'S they're",
    "two  three   four\n\nlines\tand tabs",
    "caf\u00e9 \u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f600",
    " leading and trailing ",
)


class _Tokens(NamedTuple):
    """Every token's text, type and special settings by id."""

    texts: list[str]
    types: list[int]


def tokenizer_metadata(files: Mapping[str, bytes], config: ModelConfig) -> dict[str, Any]:
    """The keys of a model's tokenizer, from its auxiliary ``files``; without one, that there is none.

    Raises InputError for a kind of tokenizer that GGUF doesn't have. Notes what goes otherwise in llama.cpp.
    """
    if TOKENIZER not in files:
        return {_KEY + "model": "no_vocab"}
    with advising(_ADVICE):
        tokenizer, _ = read_tokenizer(files, _WHERE, config.vocab_size)
        fields = json.loads(tokenizer.to_str())
        kind = fields["model"]["type"]
        if kind != "BPE":
            raise BadTokenizer(f"The tokenizer is of kind {kind}, and GGUF files of LLaMA hold only BPE.")
        tokens = _tokens(tokenizer, fields, config.vocab_size)
        steps = _steps(fields)
        if any(step["type"] == "ByteLevel" for step in steps):
            made = _byte_level(fields, steps, tokens)
        else:
            made = _sentencepiece(files, fields, tokens, tokenizer)
        made |= _special(files, config, tokenizer, tokens)
    made |= _templates(files)
    _check(made, tokenizer, config)
    return made


def _tokens(tokenizer: Tokenizer, fields: dict[str, Any], rows: int) -> _Tokens:
    """The tokens of all rows of the embedding; those without a token get an unused one."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    beyond = [text for text, i in vocab.items() if i >= rows]
    if beyond:
        raise BadTokenizer(f"The token {shown(beyond[0])} has no row in the model's embedding of {rows}.")
    texts, types = [f"[UNUSED{i}]" for i in range(rows)], [UNUSED] * rows
    for text, i in vocab.items():
        texts[i], types[i] = text, NORMAL
    if fields["model"].get("byte_fallback"):
        for byte in range(256):
            i = vocab.get(f"<0x{byte:02X}>")
            if i is not None:
                types[i] = BYTE
    for i, token in tokenizer.get_added_tokens_decoder().items():
        types[i] = CONTROL if token.special else USER_DEFINED
    unknown = fields["model"].get("unk_token")
    if unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    return _Tokens(texts, types)


def _steps(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps that cut text, in order."""
    step = fields.get("pre_tokenizer") or {"type": "Sequence", "pretokenizers": []}
    return step["pretokenizers"] if step["type"] == "Sequence" else [step]


def _byte_level(fields: dict[str, Any], steps: Sequence[dict[str, Any]], tokens: _Tokens) -> dict[str, Any]:
    patterns, nfc = _patterns(steps), "NFC" in json.dumps(fields.get("normalizer"))
    whole_words = bool(fields["model"].get("ignore_merges"))
    wanted = Cut(patterns, whole_words, nfc=nfc)
    name = next((name for name, cut in PRE_TOKENIZERS.items() if replace(cut, add_bos=False) == wanted), None)
    if name is None:
        raise BadTokenizer(f"The tokenizer cuts text by a rule that GGUF has no name for ({shown(list(patterns))}).")
    merges = [each if isinstance(each, str) else " ".join(each) for each in fields["model"]["merges"]]
    return {
        _KEY + "model": "gpt2",
        _KEY + "pre": name,
        _KEY + "tokens": tokens.texts,
        _KEY + "token_type": tokens.types,
        _KEY + "merges": merges,
    }


def _patterns(steps: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The patterns by which the steps split text, one after the other; what is no such step stands for itself."""
    found = []
    for step in steps:
        if step["type"] == "Split" and not step["invert"] and step["behavior"] == "Isolated":
            found.append(step["pattern"].get("Regex") or step["pattern"].get("String", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append(SINGLE_DIGIT)
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += [WORDS] if step["use_regex"] else []
        else:
            found.append(step["type"])
    return tuple(found)


def _sentencepiece(
    files: Mapping[str, bytes], fields: dict[str, Any], tokens: _Tokens, tokenizer: Tokenizer
) -> dict[str, Any]:
    if not fields["model"].get("byte_fallback") and SPACE not in "".join(tokens.texts):
        raise BadTokenizer("The tokenizer is neither byte-level BPE nor SentencePiece's.")
    scores, types = _scores(fields, tokens.texts), list(tokens.types)
    if MODEL in files and not is_tiktoken(files[MODEL]):
        pieces = read_pieces(files[MODEL], MODEL)
        for i, (text, score, kind) in enumerate(pieces[: len(scores)]):
            if tokens.texts[i] == text:
                scores[i] = score
                types[i] = kind if types[i] == NORMAL else types[i]
    prefix = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    return {
        _KEY + "model": "llama",
        _KEY + "pre": "default",
        _KEY + "tokens": tokens.texts,
        _KEY + "scores": scores,
        _KEY + "token_type": types,
        _KEY + "add_space_prefix": bool(prefix and prefix[0].startswith(SPACE)),
    }


def _scores(fields: dict[str, Any], texts: Sequence[str]) -> list[float]:
    """Scores by id that lead to the merges of a tokenizer.json: a piece that is joined earlier has a higher one."""
    order: dict[str, int] = {}
    for each in fields["model"]["merges"]:
        left, right = each.split(" ") if isinstance(each, str) else each
        order.setdefault(left + right, len(order))
    return [-float(order.get(text, len(order))) for text in texts]


def _special(files: Mapping[str, bytes], config: ModelConfig, tokenizer: Tokenizer, tokens: _Tokens) -> dict[str, Any]:
    """Ids of special tokens, and which are put around texts."""
    named = read_settings(files, _WHERE).named
    ids = {role: tokenizer.token_to_id(each.content) for role, each in named.items()}
    ids = {role: i for role, i in ids.items() if i is not None and i < len(tokens.texts)}
    if config.bos_token_id is not None and config.bos_token_id < len(tokens.texts):
        ids.setdefault("bos", config.bos_token_id)
    ends = [i for i in all_ends(config.eos_token_ids, files, {}, _WHERE) if i < len(tokens.texts)]
    if ends:
        ids.setdefault("eos", ends[0])
    more = [i for i in ends if i != ids.get("eos")]
    ids |= dict(zip(("eot", "eom"), more, strict=False))
    known = ends_by_text({i: tokens.texts[i] for i in more[2:]})
    for i in [i for i in more[2:] if i not in known]:
        note(f"GGUF has no key for another token that ends texts: {shown(tokens.texts[i])} ({i}) is left out.")
    around = _around(tokenizer)
    made = {f"{_KEY}{role}_token_id": i for role, i in ids.items()}
    for name, found in zip(("bos", "eos"), around, strict=True):
        made[f"{_KEY}add_{name}_token"] = found == [ids[name]] if name in ids else False
        if found and not made[f"{_KEY}add_{name}_token"]:
            note(f"The tokens {found} that the tokenizer puts around texts are no {name} token: GGUF has none of them.")
    return made


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that are put before a text and after it."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    places = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
    return (whole[: places[0]], whole[places[0] + len(plain) :]) if places else ([], [])


def _templates(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The template of chats: that of its own file, or of tokenizer_config.json."""
    fields = json.loads(files[CONFIG]) if CONFIG in files else {}
    template = fields.get("chat_template")
    if isinstance(template, list):
        by_name = {each["name"]: each["template"] for each in template}
        template = by_name.pop("default", None)
        if by_name:
            note(f"Of several templates for chats only the default goes along, not {', '.join(by_name)}.")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode()
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _check(made: dict[str, Any], tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Note where texts get other ids by the metadata than by the tokenizer they were made from."""
    from tokenizers import Tokenizer

    fixed = {"general.architecture": "llama", "llama.context_length": config.max_position_embeddings}
    try:
        files = tokenizer_files(Metadata(Path("model.gguf"), fixed | made), config.vocab_size)
    except InputError as error:
        raise InputError(f"The tokenizer can't be kept in GGUF ({str(error).rstrip('.')}). {_ADVICE}") from None
    again = Tokenizer.from_str(files[TOKENIZER].decode())
    other = [text for text in _SAMPLES if again.encode(text).ids != tokenizer.encode(text).ids]
    if other:
        note(f"By the rules of llama.cpp some texts become other tokens than here, such as {shown(other[0])}.")
