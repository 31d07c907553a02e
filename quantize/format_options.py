"""The options of the command lines that choose a weight format, from the table of formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from quantize.formats.table import CHANNEL, GROUP_SIZES, KINDS

_FLAGS = [f"--{name}" for name in KINDS]
KIND_FLAGS = f"{', '.join(_FLAGS[:-1])} or {_FLAGS[-1]}"


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one flag for each kind of format, as ``kind``, then ``group_size`` and ``zero_points``."""
    kinds = [click.option(f"--{kind.name}", "kind", flag_value=kind.name, help=kind.help) for kind in KINDS.values()]
    sizes = click.option(
        "--group-size",
        type=click.Choice([CHANNEL, *map(str, GROUP_SIZES)]),
        help="Inputs with a scale of their own; channel: one scale for all of an output's. [default: by the format]",
    )
    zero_points = click.option(
        "--zero-points", is_flag=True, help="int8 and int4: an integer with every scale that stands for zero."
    )
    for option in reversed([*kinds, sizes, zero_points]):
        command = option(command)
    return command
