"""The wire format of Protocol Buffers, as far as a message's fields: https://protobuf.dev/programming-guides/encoding

sentencepiece carries a reader of its own, which refuses to be imported beside another version of protobuf than it was
generated for; four kinds of field don't call for that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_LONGEST_VARINT = 10


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The number and value of every field in order: a (signed) integer, or the bytes of anything else.

    Raises ValueError for what is no message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if kind == _LENGTH:
            length, at = _varint(message, at)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if at + length > len(message):
            raise ValueError("it ends within a field")
        yield number, message[at : at + length]
        at += length


def read_float(value: int | bytes) -> float:
    """A field of four bytes as the number that it is. Raises ValueError for another field."""
    if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError("a field of four bytes was expected")
    return struct.unpack("<f", value)[0]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An unsigned integer of seven bits a byte, the last of which has its high bit clear; and where it ends."""
    value = 0
    for place in range(_LONGEST_VARINT):
        if at + place >= len(message):
            raise ValueError("it ends within a number")
        byte = message[at + place]
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value & ((1 << 64) - 1), at + place + 1
    raise ValueError("a number of more than ten bytes")
