"""How devices hold the tensors of a linear's weight [out, in]."""

from __future__ import annotations

from enum import Enum, auto

import torch

from runtime.model.linears.grouped import cut_into_pieces


class Layout(Enum):
    """The layouts. TILES concerns the values alone; in PIECES, scales are [groups, out], or [out]."""

    AS_STORED = auto()
    TILES = auto()  # tiled.py
    PIECES = auto()  # grouped.py: inputs, groups and pieces first, outputs last


def in_pieces(values: torch.Tensor, group: int | None, are_int4: bool) -> torch.Tensor:
    """One chip's values [out, in] as PIECES has them; ``group`` inputs share a scale, or all of them with None."""
    pieces = cut_into_pieces(values, group)
    return pieces.view(torch.int4) if are_int4 else pieces


def axis_in_pieces(axis: int | None, dimensions: int) -> int | None:
    """The axis along which a tensor of so many dimensions is split over chips that was split along ``axis``."""
    return {0: dimensions - 1, 1: 0, None: None}[axis]
