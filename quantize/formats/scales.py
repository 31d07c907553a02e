"""Weights quantized in groups of inputs, with the scale of each group chosen from the weights alone.

A group's scale in 4 bits is the one of a few dozen candidates that costs the least. A pass over the weights for each
would take too long; here all are tried in one. For the choice alone a group is brought to a common range and its
weights are rounded to a few hundred levels. What a level costs under every candidate is a row of a table, made once,
and what the group costs is the sum of its weights' rows.

Without zero points a searched scale is negative where the largest magnitude is a positive weight: then -8 stands for
that weight, where 7 would be the highest value. It costs nothing and takes a tenth off the squared error.

In 8 bits nothing is chosen: smaller scales than that of the largest magnitude take at most 3 percent off.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from converters.files.row_blocks import row_blocks
from quantize.formats.weight_format import RowErrors

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 18  # buffers of 1 MB stay near the core, and forty operations are worth starting for them
_SMALLEST_UNIT = 2.0**-120  # the smallest candidate of a scale is then a normal number, and what divides by it too
_CANDIDATES = 32  # a power of two
_CANDIDATE_STEP = 1 / 40  # from the scale by the largest magnitude down; 7/8 of it, where -8 is used, is one of them
_LEVELS_A_STEP = 16  # a multiple of 8: what is representable with one of these two scales is itself a level
_POWER = 2  # of a weight's error, as it costs


class GroupQuantized(NamedTuple):
    """``values`` int8 [n, in], ``scale`` [n, groups] and ``zeros`` int8 [n, groups]: about (values - zeros) * scale."""

    values: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor | None


def quantize_groups(
    weight: torch.Tensor,
    group: int | None,
    bits: int,
    *,
    zero_points: bool = False,
    search: bool = True,
    importance: torch.Tensor | None = None,
) -> tuple[GroupQuantized, RowErrors]:
    """Quantize whole rows [n, in] of a floating weight in groups of so many inputs, and measure what that costs.

    ``in`` is a multiple of ``group``; None makes a row one group. Scales are bfloat16 [n, in / group], or float32
    [n, 1] for whole rows, and values are chosen for the scale as it is stored. Rows are independent, so a weight may be
    quantized in any blocks of rows. Without ``search`` the scale follows from the largest magnitude and is positive.
    ``importance`` float32 [in] multiplies each input's squared error where the search weighs scales; in a group that
    has none all inputs count alike.

    A group of zeros, or of nothing that float32 could divide by, has scale 1 and values 0. NaN or an infinity in a
    group makes its scale not finite.
    """
    import torch

    rows, width = weight.shape
    size = group or width
    scheme = _Scheme(bits, zero_points, group is not None, search and bits == 4)
    values = torch.empty(rows, width, dtype=torch.int8)
    found = [torch.empty(rows, width // size) for _ in range(5)]
    blocks = list(row_blocks(0, rows, width, BLOCK_ELEMENTS))
    buffers = _Buffers.for_groups(blocks[0][1] * width // size, size)
    weighting = None if importance is None else _weighting(importance, size)
    for start, stop in blocks:
        block = buffers.first((stop - start) * width // size)
        block.weight.view(stop - start, width).copy_(weight[start:stop])
        scale, zeros = _choose(block, scheme, weighting)
        columns = (scale, zeros, *_round(block, scheme, scale, zeros))
        values[start:stop] = block.work.view(stop - start, width)
        for whole, column in zip(found, columns, strict=True):
            whole[start:stop] = column.view(stop - start, -1)
    scales, zeros, squared_errors, squared_weights, max_errors = found
    unit = scales.double()
    errors = RowErrors(
        (squared_errors.double().square_() * unit.square()).sum(1),
        (squared_weights.double().square_() * unit.square()).sum(1),
        (max_errors * unit.abs()).amax(1),
    )
    stored = scales.bfloat16() if scheme.in_bfloat16 else scales
    return GroupQuantized(values, stored, zeros.to(torch.int8) if zero_points else None), errors


def choose_scales(
    weight: torch.Tensor, bits: int, in_bfloat16: bool, *, zero_points: bool, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero point of each row [n, size] as one group, both float32 [n, 1], as ``quantize_groups``
    finds them; scales have the values that the stored dtype can hold.
    """
    scheme = _Scheme(bits, zero_points, in_bfloat16, bits == 4)
    block = _Buffers.for_groups(*weight.shape)
    block.weight.copy_(weight)
    return _choose(block, scheme, None if importance is None else _weighting(importance, weight.shape[1]))


def value_range(bits: int, zero_points: bool) -> tuple[int, int]:
    """The lowest and the highest integer that stands for a weight."""
    scheme = _Scheme(bits, zero_points, False, False)
    return scheme.lowest, scheme.highest


@dataclass(frozen=True)
class _Scheme:
    """Which whole numbers stand for a group's weights, how its scale is stored and whether it is searched for."""

    bits: int
    zero_points: bool
    in_bfloat16: bool
    searched: bool

    @property
    def lowest(self) -> int:
        """8 bits without zero points leave -128 unused, as int8 per channel does."""
        return -(1 << self.bits - 1) + (self.bits == 8 and not self.zero_points)

    @property
    def highest(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def span(self) -> int:
        return self.highest - self.lowest


class _Buffers(NamedTuple):
    """Memory [groups, inputs of a group] for a block; fresh memory for each would cost more than the arithmetic."""

    weight: torch.Tensor
    work: torch.Tensor
    index: torch.Tensor

    @classmethod
    def for_groups(cls, count: int, size: int) -> _Buffers:
        import torch

        return cls(*(torch.empty(count, size, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.int32)))

    def first(self, count: int) -> _Buffers:
        return _Buffers(*(buffer[:count] for buffer in self))


def _choose(
    block: _Buffers, scheme: _Scheme, weighting: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero point of each group [groups, 1], both in float32; without zero points they are 0.

    ``weighting`` [groups of a row, size] says how much the errors count; None: all alike.
    """
    import torch

    high, low = block.weight.amax(1, keepdim=True), block.weight.amin(1, keepdim=True)
    if scheme.zero_points:
        high, low = high.clamp_min_(0).div_(scheme.span), low.clamp_max_(0).div_(scheme.span)
        unit = high - low
    elif scheme.searched:
        unit = torch.where(high > -low, -high, -low).div_(scheme.highest)
    else:
        # In 4 bits half a step is cut off: wider steps for all would cost more.
        unit = torch.maximum(high, -low).div_(scheme.span / 2)
    nothing = unit.abs() < _SMALLEST_UNIT
    unit.masked_fill_(nothing, 1.0)
    zeros = torch.zeros_like(unit)
    if scheme.zero_points:
        zeros = low.mul_(-scheme.span).div_(unit).round_().add_(scheme.lowest).masked_fill_(nothing, 0.0)
    scale = unit * _best_factors(block, scheme, unit, zeros, weighting) if scheme.searched else unit
    return scale.bfloat16().float() if scheme.in_bfloat16 else scale, zeros


def _best_factors(
    block: _Buffers, scheme: _Scheme, unit: torch.Tensor, zeros: torch.Tensor, weighting: torch.Tensor | None
) -> torch.Tensor:
    """By what to multiply each group's ``unit`` [groups, 1] for the least cost; the larger of two alike."""
    import torch

    candidates = _candidates(scheme)
    # The row of the table, and a half to round by: levels count from half a step below a section's lowest value.
    torch.mul(block.weight, _LEVELS_A_STEP / unit, out=block.work)
    if scheme.zero_points:
        sections = zeros - scheme.lowest
        block.work.add_(sections * (candidates.section + _LEVELS_A_STEP) + (_LEVELS_A_STEP + 1) / 2)
    else:
        block.work.add_(-scheme.lowest * _LEVELS_A_STEP + (_LEVELS_A_STEP + 1) / 2)
    finite = unit.isfinite()
    if not finite.all():
        block.work.masked_fill_(~finite, 0.0)
    block.index.copy_(block.work)
    each = None if weighting is None else _spread(weighting, block.index.shape)
    costs = torch.nn.functional.embedding_bag(block.index, candidates.costs, mode="sum", per_sample_weights=each)
    # The order of floats that are not negative is that of their bits, so the last few can say which candidate it is.
    ranked = costs.view(torch.int32).bitwise_and_(-_CANDIDATES).bitwise_or_(candidates.numbers)
    best = ranked.amin(1).bitwise_and_(_CANDIDATES - 1)
    return candidates.factors.index_select(0, best).unsqueeze(1)


def _weighting(importance: torch.Tensor, size: int) -> torch.Tensor:
    """``importance`` [in] by groups [in / size, size], of which none is all zero."""
    groups = importance.view(-1, size)
    return groups.masked_fill(groups.amax(1, keepdim=True) == 0, 1.0)


def _spread(weighting: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``weighting`` [groups of a row, size] for the groups of all rows: [rows * groups of a row, size]."""
    return weighting.expand(shape[0] // len(weighting), *weighting.shape).reshape(shape)


class _Candidates(NamedTuple):
    """What scales to try, as factors of the one by the largest magnitude, and what a weight costs with each.

    A weight is measured in steps of that scale, in levels of 1 / _LEVELS_A_STEP. ``costs`` [sections * section,
    candidates] has a section for every zero point, each with all levels from half a step below the lowest value on.
    """

    factors: torch.Tensor
    numbers: torch.Tensor  # 0, 1, 2, ...
    costs: torch.Tensor
    section: int


@functools.lru_cache
def _candidates(scheme: _Scheme) -> _Candidates:
    import torch

    factors = 1 - _CANDIDATE_STEP * torch.arange(_CANDIDATES, dtype=torch.float64)
    section = (scheme.span + 1) * _LEVELS_A_STEP + 1
    levels = torch.arange(section, dtype=torch.float64).div_(_LEVELS_A_STEP).sub_(0.5).unsqueeze(1)
    costs = []
    for lowest in range(0, -scheme.span - 1, -1) if scheme.zero_points else [scheme.lowest]:
        weights = levels + lowest
        rounded = (weights / factors).round_().clamp_(lowest, lowest + scheme.span) * factors
        costs.append((weights - rounded).abs_().pow_(_POWER))
    numbers = torch.arange(_CANDIDATES, dtype=torch.int32)
    return _Candidates(factors.float(), numbers, torch.cat(costs).float(), section)


def _round(
    block: _Buffers, scheme: _Scheme, scale: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put the stored values into ``block.work``. Returns in steps of the scale, as columns [groups, 1]: the norms of
    the error and of the weight, and the largest error. ``block.weight`` is lost.
    """
    import torch

    steps, whole = block.weight.div_(scale), block.work
    torch.round(steps, out=whole)
    if scheme.zero_points:
        whole.add_(zeros).clamp_(scheme.lowest, scheme.highest).sub_(zeros)
    else:
        whole.clamp_(scheme.lowest, scheme.highest)
    weight_norm = torch.linalg.vector_norm(steps, 2, 1, keepdim=True)
    errors = torch.sub(whole, steps, out=steps)
    error_norm = torch.linalg.vector_norm(errors, 2, 1, keepdim=True)
    largest = errors.abs_().amax(1, keepdim=True)
    if scheme.zero_points:
        whole.add_(zeros)
    return error_norm, weight_norm, largest
