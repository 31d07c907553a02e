"""Integers of 1 to 8 bits in 32-bit words, without gaps: element i is at bit i * bits of a row's words.

So eight of 4 bits are in a word, and of 3 bits, 32 in three words, some of which lie across two of them.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, NamedTuple

from converters.formats.packed_integers import unpack

if TYPE_CHECKING:
    import torch

WORD_BITS = 32


class Period(NamedTuple):
    """So many ``elements`` fill so many ``words``, and no fewer fill whole ones."""

    elements: int
    words: int

    @classmethod
    def of(cls, bits: int) -> Period:
        common = gcd(bits, WORD_BITS)
        return cls(WORD_BITS // common, bits // common)

    def words_for(self, length: int) -> int:
        """The words, in whole periods, that hold so many elements."""
        return -(-length // self.elements) * self.words

    def around(self, start: int, stop: int) -> tuple[int, int, int]:
        """The words that hold elements [start, stop), [first, last), in whole periods; and the first one's element."""
        first = start // self.elements
        return first * self.words, self.words_for(stop), first * self.elements


def unpack_words(words: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The first ``length`` elements of int32 words [n, W], whole periods, as int8 [n, length]: 2^(bits - 1) taken off.

    So that the values of 4 bits are -8 to 7.
    """
    import torch

    if bits == 4:
        return unpack(words, length)
    if bits == 8:
        raw = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        return (raw ^ 128).view(torch.int8)[:, :length].contiguous()
    period = Period.of(bits)
    spans = words.unflatten(1, (-1, period.words))  # [n, periods, words of one]
    values = torch.empty(*spans.shape[:2], period.elements, dtype=torch.int8)
    for place in range(period.elements):
        word, shift = divmod(place * bits, WORD_BITS)
        low = spans[..., word] >> shift
        if shift + bits > WORD_BITS:
            low = low & ((1 << WORD_BITS - shift) - 1) | spans[..., word + 1] << WORD_BITS - shift
        values[..., place] = (low & ((1 << bits) - 1)) - (1 << bits - 1)
    return values.flatten(1)[:, :length].contiguous()
