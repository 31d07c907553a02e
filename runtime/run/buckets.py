"""Rounding prompt lengths up to a few fixed sizes, so that a handful of compiled graphs serves every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from converters.console.errors import InputError
from converters.console.units import parse_integers

DEFAULT_BUCKETS = (128, 256, 384, 512)


class Section(NamedTuple):
    """A part of the prompt processed in one execution: ``length`` tokens from ``start``, padded to ``bucket``."""

    start: int
    length: int
    bucket: int


def parse_buckets(text: str) -> tuple[int, ...]:
    """``128,256`` -> (128, 256). Raises InputError for anything but ascending positive numbers."""
    try:
        buckets = parse_integers(text)
    except ValueError:
        buckets = ()
    if not are_buckets(buckets):
        raise InputError(f"--buckets {text!r}: give ascending prompt lengths like 128,256,384,512.")
    return buckets


def are_buckets(numbers: Sequence[int]) -> bool:
    """Whether these are ascending positive numbers, at least one."""
    return bool(numbers) and numbers[0] >= 1 and all(a < b for a, b in pairwise(numbers))


def usable_buckets(buckets: Sequence[int], max_seq_len: int) -> tuple[int, ...]:
    """The buckets that fit into the cache; if none does, the cache's length as the only one."""
    return tuple(bucket for bucket in buckets if bucket <= max_seq_len) or (max_seq_len,)


def sections(length: int, buckets: Sequence[int]) -> list[Section]:
    """Cut ``length`` prompt tokens into the remainder, padded to the nearest bucket, and then full largest buckets.

    So there are length / largest sections, rounded up. The second section overwrites what the padding of the first one
    left in the cache, and all later sections have the same shape.
    """
    if not length:
        return []
    largest = buckets[-1]
    first = (length - 1) % largest + 1
    bucket = next(bucket for bucket in buckets if bucket >= first)
    return [Section(0, first, bucket), *(Section(start, largest, largest) for start in range(first, length, largest))]


def has_later_sections(buckets: Sequence[int], longest_prompt: int) -> bool:
    """Whether a prompt of ``longest_prompt`` tokens needs several sections; a decode step takes its last token."""
    return buckets[-1] < longest_prompt - 1
