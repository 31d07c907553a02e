"""What the small JSON files beside a vocabulary say: tokens added to it, special ones, BOS and EOS around texts.

Where two of them speak of one token, transformers' rule holds: added_tokens_decoder of tokenizer_config.json is the
whole truth where it is there; else special_tokens_map.json goes before tokenizer_config.json.
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
    """``special`` are the special tokens, in the order in which new ones get their ids; ``named`` are those of a role
    (bos, eos, unknown, padding). ``added`` are tokens by id. All have the settings that hold for them in the end.
    """

    where: str  # the folder, for errors
    kind: str  # tokenizer_class
    add_bos: bool | None  # None: not said
    add_eos: bool | None
    add_prefix_space: bool | None
    legacy: bool | None
    split_special: bool  # special tokens are not found in texts
    named: dict[str, Added]
    special: tuple[Added, ...]
    added: dict[int, Added]
    decoded: bool  # ``added`` comes from added_tokens_decoder

    def complete(self, vocabulary: Vocabulary, rows: int) -> Vocabulary:
        """The vocabulary with the added and special tokens, of which those without a row of the embedding are left out.

        Raises InputError for an added token of an id that another token has, or that leaves ids out.
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
                    break  # so are the ones after it
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
            f"{self.where} adds the token {shown(text)}, for which the model's {rows} rows of embeddings hold none. "
            "It is left out of tokenizer.json: a prompt that holds it is cut as any text."
        )


def read_settings(files: Mapping[str, bytes], where: str) -> Settings:
    """From the files of a folder ``where``, by name. Raises InputError for one that holds no JSON object."""
    config, special, added = (_json(files, name, where) for name in (CONFIG, SPECIAL, ADDED))
    decoded = config.get("added_tokens_decoder") is not None
    by_id = _decoder(config["added_tokens_decoder"], where) if decoded else {}
    fields = config if decoded else config | special
    known = {entry.content: entry for entry in by_id.values()}
    # Any other name on _token names a special token too: of images, say.
    keys = (*_ORDER, *(key for key in fields if key.endswith("_token") and key not in _ORDER))
    by_key = {key: entry for key in keys if (entry := _special(fields.get(key), known, where))}
    # A role's token needs no place of its own where it is named by the lesser file alone.
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
    """added_tokens_decoder: by id, as text, a token's text and settings."""
    found = {}
    for key, entry in entries.items() if isinstance(entries, dict) else [("", entries)]:
        if not re.fullmatch("[0-9]{1,9}", key) or not isinstance(entry, dict) or not _text(entry):
            raise BadTokenizer(f"{where}/{CONFIG} has an added_tokens_decoder that is none.")
        found[int(key)] = _entry(entry, where, special=entry.get("special") is True)
    return found


def _added(ids: dict[str, Any], special: set[str], where: str) -> dict[int, Added]:
    """added_tokens.json: ids by text."""
    for i in ids.values():
        if type(i) is not int or i < 0:
            raise BadTokenizer(f"{where}/{ADDED} gives a token the id {shown(i)}.")
    return {i: Added(text, special=text in special, normalized=text not in special) for text, i in ids.items()}


def _special(value: Any, known: dict[str, Added], where: str, listed: bool = False) -> Added | None:
    """A special token: its text alone or an object with settings; those of added_tokens_decoder go before.

    An object that is ``listed``, not named, is special by its place alone, which doesn't change its defaults.
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
    """A token from an object; what it leaves unsaid is as AddedToken has it."""
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
    """A special token's text: by itself, or among its settings."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _values(value: Any) -> list[Any]:
    """The tokens of a list, or of an object that gives each a name."""
    return value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []


def _flag(config: dict[str, Any], name: str, where: str) -> bool | None:
    value = config.get(name)
    if value is not None and type(value) is not bool:
        raise InputError(f"{where}/{CONFIG} has {name} {shown(value)}; it must be true or false.")
    return value
