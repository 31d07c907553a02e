"""Tokens cut into windows, and these into pieces of one fixed shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.run.buckets import DEFAULT_BUCKETS, sections

_PAD = 0  # any valid id: what follows a piece's last token changes nothing before it


class Piece(NamedTuple):
    """Consecutive tokens of a window, padded at their end to T, each with the token that it is to predict."""

    start: int  # the slot of its first token: the place in the window
    length: int  # tokens without the padding
    tokens: Tensor  # [1, T]
    following: Tensor  # [1, T]

    @property
    def slots(self) -> Tensor:
        """Where in the cache the tokens are written, [T]."""
        return torch.arange(self.start, self.start + self.tokens.shape[1])


def piece_size(window: int) -> int:
    """T: a window is taken whole up to the largest of the usual buckets, and longer ones in parts of that."""
    return min(window, DEFAULT_BUCKETS[-1])


def windows(tokens: Sequence[int], window: int) -> list[Sequence[int]]:
    """Consecutive windows of so many tokens; the last one is shorter where they don't divide the text."""
    return [tokens[start : start + window] for start in range(0, len(tokens), window)]


def predictions(count: int, window: int) -> int:
    """How many of ``count`` tokens are predicted: all but the first of each window."""
    return count - -(-count // window)


def pieces(tokens: Sequence[int], window: int) -> Iterator[Piece]:
    """The pieces of all windows, in order. A window's last token is only predicted, and one alone isn't even that."""
    size = piece_size(window)
    for each in windows(tokens, window):
        for section in sections(len(each) - 1, (size,)):
            stop = section.start + section.length
            inputs, following = each[section.start : stop], each[section.start + 1 : stop + 1]
            yield Piece(section.start, section.length, _padded(inputs, size), _padded(following, size))


def count_pieces(count: int, window: int) -> int:
    """How many pieces ``count`` tokens have."""
    full, rest = divmod(count, window)
    size = piece_size(window)
    return full * -(-(window - 1) // size) + (-(-(rest - 1) // size) if rest > 1 else 0)


def warm_up_pieces(window: int) -> list[Piece]:
    """One of padding alone for every graph that windows of this size need."""
    size = piece_size(window)
    nothing = _padded([], size)
    starts = (0, 1) if window - 1 > size else (0,)
    return [Piece(start, 0, nothing, nothing) for start in starts]


def _padded(ids: Sequence[int], size: int) -> Tensor:
    return torch.tensor([[*ids, *[_PAD] * (size - len(ids))]])
