"""The settings in the small JSON files beside a vocabulary: added and special tokens, BOS and EOS around texts.

Where two files describe one token, transformers' rule applies: added_tokens_decoder of tokenizer_config.json alone
counts where it is present; otherwise special_tokens_map.json overrides tokenizer_config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from converters.console.errors import BadTokenizer, InputError, shown
from converters.console.notes import note
from converters.tokenizers.tokenizer_json import CONTROL, UNKNOWN, USER_DEFINED, Added, Vocabulary

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# transformers adds the special tokens that a vocabulary lacks in this order.
_ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class Settings:
    """The settings of a tokenizer; its tokens have their final settings.

    ``special`` are the special tokens, in the order in which new ones get their ids; ``named`` are those with a role
    (bos, eos, unknown, padding), by role. ``added`` are tokens by id.
    """

    where: str  # the folder, for errors
    kind: str  # tokenizer_class
    add_bos: bool | None  # None: not said
    add_eos: bool | None
    add_prefix_space: bool | None
    legacy: bool | None
    split_special: bool  # special tokens in a text are split like any other text
    named: dict[str, Added]
    special: tuple[Added, ...]
    added: dict[int, Added]
    decoded: bool  # ``added`` comes from added_tokens_decoder

    def complete(self, vocabulary: Vocabulary, rows: int) -> Vocabulary:
        """The vocabulary with the added and special tokens; those without one of the embedding's ``rows`` are left out.

        Raises BadTokenizer for an added token whose id is another token's, or would leave a gap.
        """
        tokens, types = list(vocabulary.tokens), list(vocabulary.types)
        added = dict(vocabulary.added)
        for i, entry in sorted(self.added.items()):
            text = entry.content
            if i > len(tokens):
                raise BadTokenizer(f"{self.where} adds the token {shown(text)} as {i}, and has no token {len(tokens)}.")
            if i == len(tokens):
                if i >= rows:
                    self._note_without_row(text, rows)
                    break  # those after it have no row either
                tokens.append(text)
                types.append(CONTROL if entry.special else USER_DEFINED)
            elif tokens[i] != text:
                raise BadTokenizer(f"{self.where} gives the id {i} to the tokens {shown(tokens[i])} and {shown(text)}.")
            elif types[i] != UNKNOWN:
                types[i] = CONTROL if entry.special else USER_DEFINED
            added[i] = entry
        places = {text: i for i, text in enumerate(tokens)}
        for entry in self.special:
            i = places.setdefault(entry.content, len(tokens))
            if i == len(tokens) >= rows:
                self._note_without_row(places.popitem()[0], rows)
                continue
            if i == len(tokens):
                tokens.append(entry.content)
                types.append(CONTROL)
            types[i] = types[i] if types[i] == UNKNOWN else CONTROL
            added[i] = replace(added.get(i, entry), special=True)
        ids = {role: places[entry.content] for role, entry in self.named.items() if entry.content in places}
        return replace(vocabulary, tokens=tokens, types=types, ids=vocabulary.ids | ids, added=added)

    def _note_without_row(self, text: str, rows: int) -> None:
        note(
            f"{self.where} adds the token {shown(text)} beyond the model's {rows} rows of embeddings. "
            "It is left out of tokenizer.json: in a prompt it is split like any text."
        )


def read_settings(files: Mapping[str, bytes], where: str) -> Settings:
    """The settings in the auxiliary files of a folder ``where`` (name -> content).

    Raises InputError for a file that isn't a JSON object, or a setting of the wrong type.
    """
    config, special, added = (_json(files, name, where) for name in (CONFIG, SPECIAL, ADDED))
    decoded = config.get("added_tokens_decoder") is not None
    by_id = _decoder(config["added_tokens_decoder"], where) if decoded else {}
    fields = config if decoded else config | special
    known = {entry.content: entry for entry in by_id.values()}
    # Any other field that ends in _token names a special token too, for images for example.
    keys = (*_ORDER, *(key for key in fields if key.endswith("_token") and key not in _ORDER))
    by_key = {key: entry for key in keys if (entry := _special(fields.get(key), known, where))}
    # A role that only the overridden file names still counts, but its token isn't added to the special ones.
    roles = special | fields
    named = {role: entry for key, role in _ROLES.items() if (entry := _special(roles.get(key), known, where))}
    listed = [value for key in _LISTS for value in _values(fields.get(key))]
    entries = (*by_key.values(), *(_special(value, known, where, listed=True) for value in listed))
    specials = tuple(entry for entry in entries if entry)
    if not decoded:
        by_id = _added(added, {entry.content for entry in specials}, where)
    return Settings(
        where,
        kind=str(config.get("tokenizer_class") or ""),
        add_bos=_flag(config, "add_bos_token", where),
        add_eos=_flag(config, "add_eos_token", where),
        add_prefix_space=_flag(config, "add_prefix_space", where),
        legacy=_flag(config, "legacy", where),
        split_special=bool(_flag(config, "split_special_tokens", where)),
        named=named,
        special=specials,
        added=by_id,
        decoded=decoded,
    )


def _decoder(entries: Any, where: str) -> dict[int, Added]:
    """added_tokens_decoder: maps ids, written as text, to a token's text and settings."""
    found = {}
    for key, entry in entries.items() if isinstance(entries, dict) else [("", entries)]:
        if not re.fullmatch("[0-9]{1,9}", key) or not isinstance(entry, dict) or not _text(entry):
            raise BadTokenizer(f"{where}/{CONFIG} has an invalid added_tokens_decoder.")
        found[int(key)] = _entry(entry, where, special=entry.get("special") is True)
    return found


def _added(ids: dict[str, Any], special: set[str], where: str) -> dict[int, Added]:
    """added_tokens.json: maps texts to ids."""
    for i in ids.values():
        if type(i) is not int or i < 0:
            raise BadTokenizer(f"{where}/{ADDED} gives a token the id {shown(i)}.")
    return {i: Added(text, special=text in special, normalized=text not in special) for text, i in ids.items()}


def _special(value: Any, known: dict[str, Added], where: str, listed: bool = False) -> Added | None:
    """A special token, from its text alone or an object with settings; ``known`` ones (added_tokens_decoder) win.

    An object that is ``listed`` rather than named is special too, but its defaults are those of an ordinary token.
    """
    text = _text(value)
    if not text:
        return None
    if text in known:
        return replace(known[text], special=True)
    entry = value if isinstance(value, dict) else {"content": text}
    special = not (listed and isinstance(value, dict)) or entry.get("special") is True
    return replace(_entry(entry, where, special), special=True)


def _entry(entry: dict[str, Any], where: str, special: bool) -> Added:
    """A token from an object; missing settings have AddedToken's defaults."""
    flags = {name: entry[name] for name in _FLAGS if entry.get(name) is not None}
    for name, value in flags.items():
        if type(value) is not bool:
            raise InputError(
                f"{where} gives the token {shown(_text(entry))} {name} {shown(value)}; it must be true or false."
            )
    return Added(**{"content": _text(entry), "special": special, "normalized": not special} | flags)


def _json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (UnicodeDecodeError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise BadTokenizer(f"{where}/{name} holds no JSON object.")
    return content


def _text(value: Any) -> str:
    """A special token's text, from the text itself or an object; empty for any other value."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _values(value: Any) -> list[Any]:
    """The tokens in a list, or in an object that names each of them."""
    return value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []


def _flag(config: dict[str, Any], name: str, where: str) -> bool | None:
    value = config.get(name)
    if value is not None and type(value) is not bool:
        raise InputError(f"{where}/{CONFIG} has {name} {shown(value)}; it must be true or false.")
    return value
