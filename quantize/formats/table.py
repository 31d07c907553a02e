"""The table of weight formats: the kinds that command lines name, and every format that shards.json can name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from converters.console.errors import InputError
from converters.sources.codes import Coding
from quantize.formats.float8 import Float8
from quantize.formats.floating import Floating
from quantize.formats.integers import Integers
from quantize.formats.weight_format import WeightFormat

GROUP_SIZES = (128, 64, 32)
CHANNEL = "channel"  # in place of a group size: one scale per output channel
SCALE, RTN, GPTQ, AWQ = METHODS = ("scale", "rtn", "gptq", "awq")  # how values are found; see llama-quantize --help
CALIBRATED = (GPTQ, AWQ)  # those that can't do without having seen inputs


@dataclass(frozen=True)
class Kind:
    """A flag of the command lines. ``in_groups``: whether its scales are for groups where the user doesn't say."""

    name: str
    help: str
    in_groups: bool = False


KINDS = {
    each.name: each
    for each in (
        Kind("int8", "Linear layers in int8, one scale per output channel or per group."),
        Kind("int4", "Linear layers in 4 bits, one scale per 128 inputs, or 64 or 32 by the model's width.", True),
        Kind("fp8", "Linear layers in 8-bit floating point (e4m3), one scale per output channel or per group."),
        Kind("bf16", "Everything in bfloat16: nothing is quantized."),
    )
}  # fmt: skip


def _formats() -> list[WeightFormat]:
    groups = (None, *GROUP_SIZES)
    integers = [Integers(bits, size, zero) for bits in (8, 4) for size in groups for zero in (False, True)]
    # Scales of groups as GPTQ and AWQ store them: such weights are only kept, and no option asks for them.
    kept = [Integers(bits, size, zero, "float16") for bits in (8, 4) for size in GROUP_SIZES for zero in (False, True)]
    return [*integers, *map(Float8, groups), Floating("bfloat16"), *kept]


FORMATS: dict[str, WeightFormat] = {each.name: each for each in _formats()}


def find_format(kind: str, group_size: int | None = None, zero_points: bool = False) -> WeightFormat:
    """The format of a kind with scales for so many inputs (None: per output channel), as this tool quantizes.

    Raises InputError where the kind has none like it.
    """
    for each in FORMATS.values():
        if each.kind == kind and (each.group_size, each.zero_points) == (group_size, zero_points):
            return each
    option = "--zero-points" if zero_points and kind in ("fp8", "bf16") else "--group-size"
    raise InputError(f"--{kind} can't be combined with {option}. Leave it out, or give --int8 or --int4.")


def format_of(coding: Coding) -> WeightFormat | None:
    """The format that holds a source's values and scales as they are; None where there is none."""
    for each in FORMATS.values():
        same = each.quantizes and each.kind == coding.kind and each.group_size == coding.group_size
        if same and each.zero_points == coding.zero_points and each.parts[1].dtype == coding.scales:
            return each
    return None


def methods_for(formats: Iterable[WeightFormat]) -> tuple[str | None, ...]:
    """The methods that shards in these formats may have been made with; None where there was nothing to choose."""
    held = [each for each in formats if each.quantizes]
    chosen = (SCALE, RTN) if any(each.searches for each in held) else (None,)
    return (*chosen, *(CALIBRATED if held else ()))


def format_title(weight_format: WeightFormat) -> str:
    """A format in words: "int4 in groups of 128, zero points"."""
    groups = "" if weight_format.group_size is None else f" in groups of {weight_format.group_size}"
    half = ", scales in float16" if weight_format.name.endswith("-f16") else ""
    return weight_format.kind + groups + (", zero points" if weight_format.zero_points else "") + half
