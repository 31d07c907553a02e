"""Reading the fields of a Protocol Buffers message: https://protobuf.dev/programming-guides/encoding

The reader that comes with sentencepiece only works with the version of protobuf that it was generated for, and four
kinds of field are easily read without it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_LONGEST_VARINT = 10


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The number and value of every field in order; a value is a signed integer, or for other kinds its bytes.

    Raises ValueError where ``message`` is not a valid message.
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
    """The float32 in a field of four bytes. Raises ValueError for any other field."""
    if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError("a field of four bytes was expected")
    return struct.unpack("<f", value)[0]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An unsigned integer of seven bits a byte, and where it ends; only its last byte has the high bit clear."""
    value = 0
    for place in range(_LONGEST_VARINT):
        if at + place >= len(message):
            raise ValueError("it ends within a number")
        byte = message[at + place]
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value & ((1 << 64) - 1), at + place + 1
    raise ValueError("a number of more than ten bytes")
