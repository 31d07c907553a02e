"""What a compiled step takes by the compiler's own cost model, by kind of work, and what its collectives move.

Cycles over the clock, one instruction after the other. An instruction takes at least as long as its share of HBM takes
to read, also where a copy brings that beside the computation: the cost model counts those copies nowhere. What carries
no cycles is counted and filled from its bytes over the bandwidth. Collectives carry none and are left to latency.py.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import Enum

from runtime.hlo import Instruction, Module
from runtime.topology import Chip

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Neither computing nor moving data, or done on the scalar unit beside the rest.
_FREE = frozenset(
    {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "copy-done", "partition-id", "replica-id"}
)
_FREE_CALLS = ("ConcatBitcast", "X64SplitLow", "X64SplitHigh", "X64Combine")
# Copies that run beside the computation: their bytes are charged to what reads them.
_BESIDE = frozenset({"copy-start", "slice-start", "slice-done", "async-start", "async-update", "async-done"})
_LEAST_UNPRICED_BYTES = 1024  # of scalars and their like, of which a step has hundreds; their time is nothing


class Kind(Enum):
    """Kinds of work in a decode step."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    REST = "rest"


@dataclass(frozen=True)
class Share:
    """Time of one kind of work: by the cost model, and of reading its bytes from HBM alone."""

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

    ``unpriced`` counts instructions without cycles by opcode, whose ``unpriced_s`` comes from their bytes, and
    ``unknown`` those of which no time can be told at all: loops, whose rounds the text doesn't say.
    """

    shares: dict[Kind, Share]
    collectives: dict[str, Collective]
    unpriced: dict[str, int]
    unpriced_s: float
    unknown: dict[str, int]

    @property
    def estimated_s(self) -> float:
        return sum(share.estimated_s for share in self.shares.values())

    @property
    def complete(self) -> bool:
        """Whether every instruction of the step has a time."""
        return not self.unknown


def estimate(module: Module, chip: Chip, caches: frozenset[int], slots: int) -> Estimate:
    """Price a module's entry computation; without a published clock the bytes alone count.

    ``caches`` are the numbers of the parameters that are KV cache, of ``slots`` slots.
    """
    clock_hz = chip.clock_hz or math.inf
    seconds: Counter[Kind] = Counter()
    roofline: Counter[Kind] = Counter()
    counts: Counter[Kind] = Counter()
    collectives: dict[str, Collective] = {}
    unpriced: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    unpriced_s = 0.0
    for instruction in module.entry.instructions.values():
        opcode = instruction.opcode
        if (collective := _collective(opcode)) is not None:
            before = collectives.get(collective, Collective(0, 0))
            collectives[collective] = Collective(before.count + 1, before.nbytes + instruction.nbytes)
            continue
        if (
            opcode in _FREE
            or opcode in _BESIDE
            or instruction.target in _FREE_CALLS
            or _collective(opcode.removesuffix("-done")) is not None
        ):
            continue
        if opcode in ("while", "conditional", "call"):
            unknown[opcode] += 1
        reads = module.parameters_read(instruction)
        hbm_s = sum(reads.values()) / chip.hbm_bandwidth
        if instruction.cycles is None:
            moved = instruction.nbytes + sum(nbytes for _, nbytes in module.reads(instruction))
            if opcode == "dynamic-update-slice":  # in place: it writes the slice and leaves the rest
                moved = 2 * module.entry.operands(instruction)[1].nbytes
                hbm_s = 0.0
            if moved < _LEAST_UNPRICED_BYTES:
                continue
            compute_s = moved / chip.hbm_bandwidth
            unpriced[opcode] += 1
            unpriced_s += max(compute_s, hbm_s)
        else:
            compute_s = instruction.cycles / clock_hz
        kind = _kind(module, instruction, reads, caches, slots)
        seconds[kind] += max(compute_s, hbm_s)
        roofline[kind] += hbm_s
        counts[kind] += 1
    shares = {kind: Share(seconds[kind], roofline[kind], counts[kind]) for kind in Kind}
    return Estimate(shares, collectives, dict(unpriced), unpriced_s, dict(unknown))


def _collective(opcode: str) -> str | None:
    name = opcode.removesuffix("-start")
    return name if name in _COLLECTIVES else None


def _kind(module: Module, instruction: Instruction, reads: dict[str, int], caches: frozenset[int], slots: int) -> Kind:
    parameters = [module.entry.instructions[name] for name in reads]
    near = [instruction, *(source for source, _ in module.reads(instruction))]
    if any(each.parameter in caches for each in parameters) or any(_has_scores(each, slots) for each in near):
        return Kind.ATTENTION
    weights = [each for each in parameters if _is_matrix(each) and reads[each.name] == each.nbytes]
    return Kind.MATMUL if weights else Kind.REST


def _is_matrix(parameter: Instruction) -> bool:
    dims = parameter.results[0].dims
    return len(dims) == 2 and min(dims) > 1


def _has_scores(instruction: Instruction, slots: int) -> bool:
    """Whether a result ends in the cache's slots, as only attention's do; a parameter is none."""
    return instruction.parameter is None and any(
        len(array.dims) > 1 and array.dims[-1] == slots for array in instruction.results
    )
