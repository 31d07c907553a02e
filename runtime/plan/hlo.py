"""Optimized HLO text from the TPU compiler: instructions, what they read from HBM, the cost model's cycles.

The text format is XLA's own (openxla.org/xla, "HLO"); ``estimated_cycles`` is in a backend_config that libtpu adds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

# Other names end in the number of bits.
_ITEM_BITS = {"pred": 8, "f8e4m3fn": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_ARRAY = re.compile(r"\b(pred|f8e4m3fn|bf16|f16|f32|f64|[su](?:2|4|8|16|32|64))\[([0-9,]*)\](?:\{[^}]*\})?")
_HEAD = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CALLS = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")
# Opcodes that pass an array on without reading it; dynamic-update-slice does so in place.
_HANDED_ON = frozenset(
    {
        "bitcast",
        "copy-start",
        "copy-done",
        "slice-start",
        "slice-done",
        "get-tuple-element",
        "opt-barrier",
        "dynamic-update-slice",
    }
)
_JOINED_COPIES = "ConcatBitcast"  # a custom call that joins separately copied slices of one array into that array


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result; ``on_chip`` where the compiler placed it in a memory other than HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def nbytes(self) -> int:
        bits = _ITEM_BITS.get(self.dtype) or int(self.dtype[1:])
        return prod(self.dims) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. ``cycles`` is None where the cost model gives none."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    calls: str | None
    cycles: int | None
    parameter: int | None  # the number of a parameter; None for anything else
    target: str | None  # the target of a custom call

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.results)


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they are scheduled."""

    name: str
    instructions: dict[str, Instruction]

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {each.parameter: each for each in self.instructions.values() if each.parameter is not None}

    def users(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions.values() if name in each.operands]

    def written_back(self, instruction: Instruction) -> int:
        """Bytes that an asynchronous copy writes from on-chip memory to HBM; 0 for any other instruction."""
        if instruction.opcode != "copy-start":
            return 0
        written, read, *_ = instruction.results
        return written.nbytes if read.on_chip and not written.on_chip else 0

    def source(self, instruction: Instruction) -> Instruction:
        """The instruction an array originates from, behind bitcasts, asynchronous copies and in-place updates."""
        while _hands_on(instruction) and (operands := self.operands(instruction)):
            instruction = operands[0]
        return instruction


@dataclass(frozen=True)
class Module:
    """A compiled module: its entry computation and those that it calls."""

    entry: Computation
    called: dict[str, Computation] = field(repr=False)

    def reads(self, instruction: Instruction) -> list[tuple[Instruction, int]]:
        """Each operand's ``source``, and how many bytes of it are read.

        A fusion that only takes slices of an operand reads only those.
        """
        inside = self.called.get(instruction.calls or "")
        found = []
        for place, operand in enumerate(self.entry.operands(instruction)):
            nbytes = operand.nbytes
            if inside and place in inside.parameters:
                nbytes = min(nbytes, _taken(inside, inside.parameters[place]))
            found.append((self.entry.source(operand), nbytes))
        return found

    def parameters_read(self, instruction: Instruction) -> dict[str, int]:
        """Bytes that an instruction reads of each of the module's parameters, by name."""
        found: dict[str, int] = {}
        for source, nbytes in self.reads(instruction):
            if source.parameter is not None:
                found[source.name] = max(found.get(source.name, 0), nbytes)
        return found


def parse_module(text: str) -> Module:
    """Read the text of a module. Raises ValueError where it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, name, instructions = None, None, {}
    for line in text.split("\n"):
        if name is None:
            if line.endswith("{") and not line.startswith(("HloModule", " ")):
                title = line.removeprefix("ENTRY ").lstrip("%")
                name, instructions = re.split(r"[ (]", title, maxsplit=1)[0], {}
                entry = name if line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions)
            name = None
        elif (instruction := _instruction(line)) is not None:
            instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the module's text has no ENTRY computation")
    return Module(computations.pop(entry), computations)


def _hands_on(instruction: Instruction) -> bool:
    return instruction.opcode in _HANDED_ON or instruction.target == _JOINED_COPIES


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    shape, rest = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    operands, attributes = _balanced("(" + rest)
    cycles, calls, target = (each.search(attributes) for each in (_CYCLES, _CALLS, _TARGET))
    return Instruction(
        name=head[1],
        opcode=opcode,
        results=tuple(_arrays(shape)),
        operands=tuple(_NAME.findall(operands)),
        calls=calls[1] if calls else None,
        cycles=int(cycles[1]) if cycles else None,
        parameter=int(operands[1:-1]) if opcode == "parameter" else None,
        target=target[1] if target else None,
    )


def _arrays(shape: str) -> Iterator[Array]:
    for match in _ARRAY.finditer(shape):
        dims = tuple(int(size) for size in match[2].split(",") if size)
        yield Array(match[1], dims, on_chip=bool(re.search(r"S\(\d+\)", match[0])))


def _balanced(text: str) -> tuple[str, str]:
    """Split ``text``, which starts with a parenthesis, behind the matching closing one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def _taken(inside: Computation, parameter: Instruction) -> int:
    """Bytes of a fusion's parameter that its instructions read: only the slices if all of its users take slices."""
    users = inside.users(parameter.name)
    if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
        return sum(user.nbytes for user in users)
    return parameter.nbytes
