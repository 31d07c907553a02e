"""Values of 4 or 8 bits as bytes for XLA:CPU, in the order in which its loop over them (``summed.py``) goes.

A weight [out, in] is held as bytes [out, chunks, groups, lanes]: a group is the inputs that share a scale, and a chunk
the groups that are summed before their lanes are. Two 4-bit values share a byte, where a group has an even number of
inputs: the low half is the group's first half of inputs, with 8 added, and the high half, signed, is the second. Either
is read by one mask, without a shift: the high half as 16 times the value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

import torch

from runtime.model.linears.tiled import empty_in_huge_pages

LOW, HIGH = 15, -16  # masks of a byte's halves
OFFSET = 8  # added to the values in the low halves
_UNROLLED = 16  # the most values of a lane that XLA:CPU's compiler unrolls the loop for; 8 are a tenth slower


class Values(Enum):
    """What values are; ``INT4`` are integers from -8 to 7, which come as int8, ``FP8`` is float8_e4m3fn."""

    INT4 = auto()
    INT8 = auto()
    FP8 = auto()


@dataclass(frozen=True)
class Coded:
    """A weight's values as int8 [out, chunks, groups, lanes], or [chips, out, ...] if chips hold some inputs each."""

    kind: Values
    bytes: torch.Tensor
    halves: int  # the values in a byte

    @property
    def nbytes(self) -> int:
        return self.bytes.nbytes

    @property
    def inputs(self) -> int:
        """The number of inputs; per chip where they are split over chips."""
        return self.halves * self.bytes.shape[-3:].numel()


def values_in_a_byte(kind: Values, inputs: int, groups: int) -> int:
    """Two for 4 bits, if ``groups`` groups of so many inputs in all can be halved; else one."""
    return 2 if kind is Values.INT4 and inputs // groups % 2 == 0 else 1


def coded_shape(kind: Values, inputs: int, groups: int | None) -> tuple[int, int, int]:
    """The shape of an output's bytes; ``groups`` is None where one scale counts for all inputs.

    Raises ValueError where the inputs aren't whole groups.
    """
    groups = groups or 1
    if inputs % groups:
        raise ValueError(f"{inputs} inputs are no {groups} groups")
    halves = values_in_a_byte(kind, inputs, groups)
    chunk = next(count for count in range(_UNROLLED // halves, 0, -1) if groups % count == 0)
    return groups // chunk, chunk, inputs // groups // halves


def encode(values: torch.Tensor, kind: Values, groups: int | None = None) -> torch.Tensor:
    """Some outputs' values [n, in], int8 or float8_e4m3fn, as bytes [n, chunks, groups, lanes]."""
    outputs, inputs = values.shape
    shape = coded_shape(kind, inputs, groups)
    if kind is Values.FP8:
        values = values.view(torch.int8)
    if values_in_a_byte(kind, inputs, groups or 1) == 1:
        return values.reshape(outputs, *shape)
    low, high = values.reshape(outputs, *shape[:2], 2, shape[2]).unbind(3)
    return (low + OFFSET) | (high << 4)


def encode_blocks(blocks: Iterable[torch.Tensor], out: int, kind: Values, groups: int | None = None) -> torch.Tensor:
    """``encode`` of a weight [out, in] that comes as blocks of its rows, so that no two of it are in memory."""
    held = None
    begin = 0
    for block in blocks:
        if held is None:
            shape = (out, *coded_shape(kind, block.shape[1], groups))
            [held] = empty_in_huge_pages([shape], torch.int8)
        held[begin : begin + len(block)] = encode(block, kind, groups)
        begin += len(block)
    if held is None or begin != out:
        raise ValueError(f"{begin} rows of a weight that has {out}")
    return held
