"""Damage to files, drawn at random: bytes, JSON values, safetensors headers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

_NESTED: Any = 0
for _ in range(60):
    _NESTED = [_NESTED]
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**53, -(2**63), 2**64, 10**400),
    *(0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "1", "x", "\ud800", "é☃\u2028\x1b[2J", "../x", "/etc/passwd", "a" * 10000, "\0"),
    *([], {}, [[]], [1, 2], {"a": {"b": None}}, _NESTED),
)


def damage_bytes(data: bytes, random: Random) -> bytes:
    """Flip, cut out, put in, double or truncate: one to three times, most often near the beginning."""
    changed = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        if not changed:
            break
        place = random.randrange(min(len(changed), random.choice((8, 64, 2000, len(changed)))))
        length = random.choice((1, 2, 8, 100))
        kind = random.choice(("flip", "set", "delete", "insert", "double", "truncate"))
        if kind == "flip":
            changed[place] ^= 1 << random.randrange(8)
        elif kind == "set":
            changed[place : place + length] = random.choice((b"\0", b"\xff", b"9", b'"')) * length
        elif kind == "delete":
            del changed[place : place + length]
        elif kind == "insert":
            changed[place:place] = random.randbytes(length)
        elif kind == "double":
            changed[place:place] = changed[place : place + length]
        else:
            del changed[place:]
    return bytes(changed)


def damage_json(data: bytes, random: Random) -> bytes:
    """Replace, remove, rename or exchange values anywhere in a JSON document; now and then damage its text."""
    if random.random() < 0.15:
        return damage_bytes(data, random)
    document = json.loads(data)
    for _ in range(random.randrange(1, 4)):
        document = _damage_value(document, random)
    return json.dumps(document).encode("utf-8", "surrogatepass")


def damage_header(data: bytes, random: Random) -> bytes:
    """The same in the header of a safetensors file, its length kept true except now and then."""
    length = int.from_bytes(data[:8], "little")
    header, values = damage_json(data[8 : 8 + length], random), data[8 + length :]
    told = random.choice((len(header),) * 9 + (random.choice((0, 1, 2**31, 2**63, len(header) + 1)),))
    return told.to_bytes(8, "little") + header + values


def _damage_value(document: Any, random: Random) -> Any:
    places = list(_places(document))
    if not places:
        return random.choice(ODD_VALUES)
    holder, key = random.choice(places)
    kind = random.choice(("odd", "odd", "odd", "near", "remove", "rename", "copy"))
    if kind == "odd":
        holder[key] = deepcopy(random.choice(ODD_VALUES))
    elif kind == "near" and type(holder[key]) is int:
        holder[key] += random.choice((-1, 1, holder[key]))
    elif kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        name = random.choice(("x", "", key + "x", key[:-1], "\ud800", "model.layers.7.mlp.up_proj.weight"))
        holder[name] = holder.pop(key)
    else:
        other, place = random.choice(places)
        holder[key] = deepcopy(other[place])
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(pairs):
        yield value, key
        yield from _places(child)
