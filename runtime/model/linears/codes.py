"""Values of 4 or 8 bits as bytes for XLA:CPU, in the order in which its loop over them (``summed.py``) goes.

A weight [out, in] is cut along its inputs into pieces, and a piece is held as bytes [out, chunks, groups, lanes]: a
group is the inputs that share a scale, and a chunk the groups that are summed before their lanes are. Two 4-bit values
share a byte, where a group has an even number of inputs: the low half is the group's first half of inputs, with 8
added, and the high half, signed, is the second. Either is read by one mask, without a shift: the high half as 16 times
the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import torch

from runtime.model.linears.tiled import empty_in_huge_pages

LOW, HIGH = 15, -16  # masks of a byte's halves
OFFSET = 8  # added to the values in the low halves
_LANES = 64  # pieces without groups have a multiple of so many, a vector register's bytes
_UNROLLED = 16  # the most values of a lane that XLA:CPU's compiler unrolls the loop for; 8 are a tenth slower


class Values(Enum):
    """What values are; ``INT4`` are integers from -8 to 7, which come as int8, ``FP8`` is float8_e4m3fn."""

    INT4 = auto()
    INT8 = auto()
    FP8 = auto()


# Inputs of a piece, approximately. The prepared row of a larger one doesn't stay in the nearest cache; with smaller
# ones 8-bit values are still in a cache for the next row, to which 4-bit values come fast enough anyway.
PIECE = {Values.INT4: 4096, Values.INT8: 1024, Values.FP8: 1024}


class Piece(NamedTuple):
    """Consecutive groups of a weight: the number of chunks, of groups in each, and of bytes in a group."""

    chunks: int
    groups: int
    lanes: int


@dataclass(frozen=True)
class Coded:
    """A weight's values as int8: pieces [out, chunks, groups, lanes], or [chips, out, ...] if chips hold some inputs
    each.
    """

    kind: Values
    pieces: Sequence[torch.Tensor]
    halves: int  # the values in a byte

    @property
    def inputs(self) -> int:
        """The number of inputs; per chip where they are split over chips."""
        return self.halves * sum(piece.shape[-3:].numel() for piece in self.pieces)


class Coding(NamedTuple):
    """How the values of an output are held."""

    kind: Values
    halves: int  # the values in a byte
    pieces: tuple[Piece, ...]

    def encode(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Some outputs' values [n, in], int8 or float8_e4m3fn, as bytes: pieces [n, chunks, groups, lanes]."""
        if self.kind is Values.FP8:
            values = values.view(torch.int8)
        widths = [self.halves * chunks * groups * lanes for chunks, groups, lanes in self.pieces]
        parts = values.split(widths, dim=1)
        return [self._encode_piece(part, piece) for part, piece in zip(parts, self.pieces, strict=True)]

    def _encode_piece(self, values: torch.Tensor, piece: Piece) -> torch.Tensor:
        if self.halves == 1:
            return values.unflatten(1, piece)
        low, high = values.unflatten(1, (piece.chunks, piece.groups, 2, piece.lanes)).unbind(3)
        return (low + OFFSET) | (high << 4)

    def encode_blocks(self, blocks: Iterable[torch.Tensor], out: int) -> Coded:
        """A weight [out, in] that comes as blocks of its rows, so that no two of it are in memory."""
        held = empty_in_huge_pages([(out, *piece) for piece in self.pieces], torch.int8)
        begin = 0
        for block in blocks:
            for whole, part in zip(held, self.encode(block), strict=True):
                whole[begin : begin + len(block)] = part
            begin += len(block)
        if begin != out:
            raise ValueError(f"{begin} rows of a weight that has {out}")
        return Coded(self.kind, held, self.halves)


def coding_of(kind: Values, inputs: int, groups: int | None) -> Coding:
    """How values are held of so many inputs, on one chip; ``groups`` is None where one scale counts for all of them.

    Raises ValueError where the inputs aren't whole groups.
    """
    if inputs % (groups or 1):
        raise ValueError(f"{inputs} inputs are no {groups} groups")
    if groups is None:
        halves = 2 if kind is Values.INT4 and inputs % 2 == 0 else 1
        lanes = inputs // halves
        width = -(-lanes // (max(1, round(inputs / PIECE[kind])) * _LANES)) * _LANES
        return Coding(kind, halves, tuple(Piece(1, 1, min(width, lanes - begin)) for begin in range(0, lanes, width)))
    group = inputs // groups
    halves = 2 if kind is Values.INT4 and group % 2 == 0 else 1
    chunk = max(1, min(_UNROLLED // halves, PIECE[kind] // group, groups))
    most = max(1, PIECE[kind] // (chunk * group))  # chunks of a piece
    chunks, rest = divmod(groups, chunk)
    pieces = [Piece(min(most, chunks - begin), chunk, group // halves) for begin in range(0, chunks, most)]
    if rest:
        pieces.append(Piece(1, rest, group // halves))
    return Coding(kind, halves, tuple(pieces))
