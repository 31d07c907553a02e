"""What the small JSON files beside a vocabulary say: tokens added to it, special ones, BOS and EOS around texts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from converters.errors import InputError, shown
from converters.tokenizer_json import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class Settings:
    """``special`` texts by role (bos, eos, unknown, padding); ``added`` texts by id, and whether each is special."""

    where: str  # the folder, for errors
    kind: str  # tokenizer_class
    add_bos: bool | None  # None: not said
    add_eos: bool | None
    add_prefix_space: bool | None
    special: dict[str, str]
    added: dict[int, tuple[str, bool]]

    def complete(self, vocabulary: Vocabulary) -> Vocabulary:
        """The vocabulary with the added tokens, and with the special ones marked.

        Raises InputError for an added token of an id that another token has, or that leaves ids out.
        """
        tokens, types = list(vocabulary.tokens), list(vocabulary.types)
        for i, (text, special) in sorted(self.added.items()):
            if i > len(tokens):
                raise InputError(f"{self.where} adds the token {shown(text)} as {i}, and has no token {len(tokens)}.")
            if i == len(tokens):
                tokens.append(text)
                types.append(CONTROL if special else USER_DEFINED)
            elif tokens[i] != text:
                raise InputError(f"{self.where} gives the id {i} to the tokens {shown(tokens[i])} and {shown(text)}.")
            elif types[i] != UNKNOWN:
                types[i] = CONTROL if special else USER_DEFINED
        places = {text: i for i, text in enumerate(tokens)}
        ids = {role: places[text] for role, text in self.special.items() if text in places}
        for i in ids.values():
            types[i] = types[i] if types[i] == UNKNOWN else CONTROL
        return replace(vocabulary, tokens=tokens, types=types, ids=vocabulary.ids | ids)


def read_settings(files: Mapping[str, bytes], where: str) -> Settings:
    """From the files of a folder ``where``, by name. Raises InputError for one that holds no JSON object."""
    config, special, added = (_json(files, name, where) for name in (CONFIG, SPECIAL, ADDED))
    by_role = {
        role: text for fields in (special, config) for key, role in _ROLES.items() if (text := _text(fields.get(key)))
    }
    for i in added.values():
        if type(i) is not int or i < 0:
            raise InputError(f"{where}/{ADDED} gives a token the id {shown(i)}; fetch it again.")
    found = {i: (text, text in by_role.values()) for text, i in added.items()}
    return Settings(
        where,
        kind=str(config.get("tokenizer_class") or ""),
        add_bos=_flag(config, "add_bos_token", where),
        add_eos=_flag(config, "add_eos_token", where),
        add_prefix_space=_flag(config, "add_prefix_space", where),
        special=by_role,
        added=found | _decoder(config.get("added_tokens_decoder"), where),
    )


def _decoder(entries: Any, where: str) -> dict[int, tuple[str, bool]]:
    """added_tokens_decoder: by id, as text, a token's text and properties."""
    found = {}
    for key, entry in entries.items() if isinstance(entries, dict) else [("", entries)] if entries else []:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not re.fullmatch("[0-9]{1,9}", key) or not isinstance(content, str):
            raise InputError(f"{where}/{CONFIG} has an added_tokens_decoder that is none; fetch it again.")
        found[int(key)] = (content, bool(entry.get("special")))
    return found


def _json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (UnicodeDecodeError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{where}/{name} holds no JSON object; fetch it again.")
    return content


def _text(value: Any) -> str:
    """A special token's text: by itself, or among its other properties."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _flag(config: dict[str, Any], name: str, where: str) -> bool | None:
    value = config.get(name)
    if value is not None and type(value) is not bool:
        raise InputError(f"{where}/{CONFIG} has {name} {shown(value)}; it must be true or false.")
    return value
