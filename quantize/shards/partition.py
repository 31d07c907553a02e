"""How each axis of the parameter table is split over chips: whole heads, even blocks, zeros where they don't divide.

Every chip's part of an axis is a list of segments of the unsplit axis. All chips hold the same number of elements, as
XLA's SPMD partitioner requires. Splitting, putting back together, sizing and loading all read these segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import gcd

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from converters.model.parameters import Axis

MAX_CHIPS = 4096


@dataclass(frozen=True)
class Segment:
    """``length`` consecutive elements of an axis from ``start``; with ``start`` None, as many zeros."""

    start: int | None
    length: int

    def in_units_of(self, step: int) -> Segment:
        """The same in units of ``step`` elements, a divisor of both."""
        return Segment(None if self.start is None else self.start // step, self.length // step)


@dataclass(frozen=True)
class HeadPlan:
    """Which heads each chip holds: ``kv_per_chip`` KV heads, and ``group`` query heads under each of them.

    ``kv_heads`` names the KV head in every place of every chip, chip by chip, and ``query_heads`` the query head in
    every place under those; None is a head of zeros. A KV head may take several places, a query head takes one.
    """

    chips: int
    kv_per_chip: int
    group: int
    kv_heads: tuple[int | None, ...]  # [chips * kv_per_chip]
    query_heads: tuple[int | None, ...]  # [chips * kv_per_chip * group]

    @property
    def kv_places(self) -> int:
        return len(self.kv_heads)

    @property
    def query_places(self) -> int:
        return len(self.query_heads)


@lru_cache(maxsize=64)
def plan_heads(num_heads: int, num_kv_heads: int, chips: int) -> HeadPlan:
    """Place heads on chips at the least cost in weights and cache.

    Query heads must be on the chip that holds their KV head. With P = chips * kv_per_chip places for KV heads,
    each KV head gets at least P // num_kv_heads of them, and a place serves as many of its query heads as are then
    needed. Of all kv_per_chip, the one with the fewest places in total is taken (the fewest for KV heads among equals).
    """
    group_size = num_heads // num_kv_heads
    fewest = -(-num_kv_heads // chips)

    def group_for(kv_per_chip: int) -> int:
        return -(-group_size // (chips * kv_per_chip // num_kv_heads))

    # Past one query head per place, further places are only padding.
    enough = -(-num_kv_heads * group_size // chips)
    kv_per_chip = min(
        range(fewest, max(fewest, enough) + 1), key=lambda count: (chips * count * (1 + group_for(count)), count)
    )
    group = group_for(kv_per_chip)
    copies = -(-group_size // group)
    kv_heads: list[int | None] = []
    query_heads: list[int | None] = []
    for kv_head in range(num_kv_heads):
        for copy in range(copies):
            kv_heads.append(kv_head)
            first = copy * group
            query_heads += [
                kv_head * group_size + member if member < group_size else None for member in range(first, first + group)
            ]
    spare = chips * kv_per_chip - len(kv_heads)
    kv_heads += [None] * spare
    query_heads += [None] * (spare * group)
    return HeadPlan(chips, kv_per_chip, group, tuple(kv_heads), tuple(query_heads))


@lru_cache(maxsize=64)  # the layers of a model all ask the same
def axis_segments(config: ModelConfig, axis: Axis, chips: int, alignment: int = 1) -> tuple[tuple[Segment, ...], ...]:
    """For each chip, what it holds of an axis that is split: segments in order, adjacent ones joined.

    Blocks are multiples of ``alignment``; heads are taken whole, whatever it is.
    """
    check_chips(chips)
    if axis in (Axis.QUERY, Axis.KV):
        plan = plan_heads(config.num_heads, config.num_kv_heads, chips)
        heads = plan.query_heads if axis is Axis.QUERY else plan.kv_heads
        per_chip = len(heads) // chips
        return tuple(
            _head_segments(heads[chip * per_chip : (chip + 1) * per_chip], config.head_dim) for chip in range(chips)
        )
    length = axis.length(config)
    block = -(-length // (chips * alignment)) * alignment
    return tuple(_block_segments(length, block, chip * block) for chip in range(chips))


@lru_cache(maxsize=64)
def block_alignment(config: ModelConfig, axis: Axis, chips: int, group_size: int | None) -> int:
    """What each chip's block of a feed-forward layer is a multiple of, where scales count for ``group_size`` inputs.

    Chips with whole groups cost padding; chips that begin within groups cost repeated scales. The least sum is taken,
    counted for weights of 4 bits in three matrices and scales of 16 bits in the one whose inputs are split.
    """
    if group_size is None or axis is not Axis.FFN:
        return 1
    length = axis.length(config)

    def cost(alignment: int) -> int:
        held = -(-length // (chips * alignment)) * alignment * chips
        return held * 3 * 4 + held // gcd(group_size, held // chips) * 16

    return min((group_size // part for part in _divisors(group_size)), key=cost)


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


@dataclass(frozen=True)
class Split:
    """What each chip holds of a tensor's axis, in elements that may be finer than the tensor's own.

    Where an element of the tensor stands for several of the axis (a scale for a group of inputs) and chips begin or
    end within them, every element is repeated ``repeat`` times first, so that chips hold whole ones again.
    """

    segments: tuple[tuple[Segment, ...], ...]  # by chip
    repeat: int = 1

    @property
    def length(self) -> int:
        """Elements that each chip holds, padding included."""
        return sum(segment.length for segment in self.segments[0])


@lru_cache(maxsize=64)
def axis_split(config: ModelConfig, axis: Axis, chips: int, alignment: int = 1, inputs: int = 1) -> Split:
    """The split of a tensor whose elements stand for ``inputs`` elements of the axis each; see ``axis_segments``."""
    segments = axis_segments(config, axis, chips, alignment)
    if inputs == 1:
        return Split(segments)
    bounds = [bound for chip in segments for each in chip for bound in (each.start or 0, each.length)]
    step = gcd(inputs, *bounds)
    return Split(tuple(tuple(each.in_units_of(step) for each in chip) for chip in segments), inputs // step)


def check_chips(chips: int) -> None:
    """Raise InputError for a number of chips that no slice has."""
    if type(chips) is not int or not 1 <= chips <= MAX_CHIPS:
        raise InputError(f"{chips} chips can't be sharded for; give 1 to {MAX_CHIPS}.")


def _head_segments(heads: tuple[int | None, ...], head_dim: int) -> tuple[Segment, ...]:
    """Heads as segments of elements, runs of following heads (and of zero heads) joined."""
    segments = []
    for _, run in groupby(enumerate(heads), key=lambda item: None if item[1] is None else item[1] - item[0]):
        members = [head for _, head in run]
        start = None if members[0] is None else members[0] * head_dim
        segments.append(Segment(start, len(members) * head_dim))
    return tuple(segments)


def _block_segments(length: int, block: int, start: int) -> tuple[Segment, ...]:
    held = max(0, min(block, length - start))
    segments = (Segment(start, held),) if held else ()
    return (*segments, Segment(None, block - held)) if held < block else segments
