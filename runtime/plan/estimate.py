"""A compiled step's time for each kind of work, by the compiler's own cost model, and what its collectives move.

The time is the cycles over the clock, summed over instructions. An instruction takes at least as long as reading its
bytes from HBM, even where an asynchronous copy has fetched them: the cost model gives those copies no cycles, nor those
that write an updated cache back. An instruction without cycles is counted, and priced at its bytes over the bandwidth.
Collectives have no cycles either and are left to latency.py.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import Enum

from runtime.plan.chips import Chip
from runtime.plan.hlo import Instruction, Module

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that neither compute nor move data, or run on the scalar unit at the same time as the rest.
_FREE = frozenset(
    {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "copy-done", "partition-id", "replica-id"}
)
_FREE_CALLS = ("ConcatBitcast", "X64SplitLow", "X64SplitHigh", "X64Combine")
# Asynchronous copies: their bytes are charged to the instructions that read them.
_BESIDE = frozenset({"copy-start", "slice-start", "slice-done", "async-start", "async-update", "async-done"})
_LOOPS = ("while", "conditional", "call")
_LEAST_UNPRICED_BYTES = 1024  # below this are scalars and the like: a step has hundreds, which take no time


class Kind(Enum):
    """Kinds of work in a decode step."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    REST = "rest"


@dataclass(frozen=True)
class Share:
    """Time of one kind of work: by the cost model, and for reading its bytes from HBM alone."""

    estimated_s: float
    roofline_s: float
    instructions: int


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, and the bytes of their results on each chip."""

    count: int
    nbytes: int


@dataclass(frozen=True)
class Estimate:
    """A step's time without its collectives, and its collectives.

    ``unpriced`` counts instructions without cycles by opcode; their ``unpriced_s`` comes from their bytes. ``unknown``
    counts those whose time can't be told at all: loops, because the text doesn't state their trip counts.
    """

    shares: dict[Kind, Share]
    collectives: dict[str, Collective]
    unpriced: dict[str, int]
    unpriced_s: float
    unknown: dict[str, int]
    cycles: int  # of the instructions that have some; the roofline may take longer

    @property
    def estimated_s(self) -> float:
        return sum(share.estimated_s for share in self.shares.values())

    @property
    def complete(self) -> bool:
        """Whether every instruction of the step has a time."""
        return not self.unknown


def estimate(module: Module, chip: Chip, caches: frozenset[int], slots: int) -> Estimate:
    """Price a module's entry computation; without a published clock only the bytes count.

    ``caches`` are the numbers of the parameters that are KV cache; the step attends to ``slots`` slots of it.
    """
    seconds: Counter[Kind] = Counter()
    roofline: Counter[Kind] = Counter()
    counts: Counter[Kind] = Counter()
    collectives: dict[str, Collective] = {}
    unpriced: Counter[str] = Counter()
    unpriced_s, cycles = 0.0, 0
    for instruction in module.entry.instructions.values():
        if (name := _collective(instruction.opcode)) is not None:
            before = collectives.get(name, Collective(0, 0))
            collectives[name] = Collective(before.count + 1, before.nbytes + instruction.nbytes)
        elif (price := _price(module, instruction, chip)) is not None:
            kind = _kind(module, instruction, caches, slots)
            seconds[kind] += price.seconds
            roofline[kind] += price.hbm_s
            counts[kind] += 1
            cycles += instruction.cycles or 0
            if price.filled:
                unpriced[instruction.opcode] += 1
                unpriced_s += price.seconds
    shares = {kind: Share(seconds[kind], roofline[kind], counts[kind]) for kind in Kind}
    unknown = Counter(each.opcode for each in module.entry.instructions.values() if each.opcode in _LOOPS)
    return Estimate(shares, collectives, dict(unpriced), unpriced_s, dict(unknown), cycles)


@dataclass(frozen=True)
class _Price:
    """Seconds that an instruction computes, and seconds that reading its bytes from HBM takes at the same time."""

    compute_s: float
    hbm_s: float
    filled: bool = False  # it has no cycles; the time comes from its bytes

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.hbm_s)


def _price(module: Module, instruction: Instruction, chip: Chip) -> _Price | None:
    """An instruction's price; None where it takes no time of its own."""
    if written := module.entry.written_back(instruction):
        return _Price(written / chip.hbm_bandwidth, 0.0, filled=True)
    if _is_free(instruction):
        return None
    if instruction.opcode == "dynamic-update-slice":  # in place: only the slice is written
        hbm_bytes, moved = 0, 2 * module.entry.operands(instruction)[1].nbytes
    else:
        hbm_bytes = sum(module.parameters_read(instruction).values())
        moved = instruction.nbytes + sum(nbytes for _, nbytes in module.reads(instruction))
    hbm_s = hbm_bytes / chip.hbm_bandwidth
    if instruction.cycles is not None:
        return _Price(instruction.cycles / (chip.clock_hz or math.inf), hbm_s)
    if moved < _LEAST_UNPRICED_BYTES:
        return None
    return _Price(moved / chip.hbm_bandwidth, hbm_s, filled=True)


def _is_free(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    is_end = _collective(opcode.removesuffix("-done")) is not None
    return opcode in _FREE or opcode in _BESIDE or instruction.target in _FREE_CALLS or is_end


def _collective(opcode: str) -> str | None:
    name = opcode.removesuffix("-start")
    return name if name in _COLLECTIVES else None


def _kind(module: Module, instruction: Instruction, caches: frozenset[int], slots: int) -> Kind:
    reads = module.parameters_read(instruction)
    parameters = [module.entry.instructions[name] for name in reads]
    near = [instruction, *(source for source, _ in module.reads(instruction))]
    if any(each.parameter in caches for each in parameters) or any(_has_scores(each, slots) for each in near):
        return Kind.ATTENTION
    weights = [each for each in parameters if _is_matrix(each) and reads[each.name] == each.nbytes]
    return Kind.MATMUL if weights else Kind.REST


def _is_matrix(parameter: Instruction) -> bool:
    dims = parameter.results[0].dims
    return len(dims) in (2, 3) and min(dims[-2:]) > 1


def _has_scores(instruction: Instruction, slots: int) -> bool:
    """Whether a result's last axis is the slots attended to, as only in attention; False for parameters."""
    return instruction.parameter is None and any(
        len(array.dims) > 1 and array.dims[-1] == slots for array in instruction.results
    )
