"""The options of the command lines that choose a weight format, from the table of formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from quantize.formats.table import CHANNEL, GROUP_SIZES, KINDS, find_format

if TYPE_CHECKING:
    from converters.model.config import ModelConfig
    from quantize.shards.scheme import Scheme

_FLAGS = [f"--{name}" for name in KINDS]
KIND_FLAGS = f"{', '.join(_FLAGS[:-1])} or {_FLAGS[-1]}"


@dataclass(frozen=True)
class AskedFormat:
    """A weight format as a user asked for it: a kind, and what else was given; None and False where it wasn't."""

    kind: str | None
    group_size: str | None = None  # CHANNEL, or how many inputs share a scale
    zero_points: bool = False

    def scheme(self, config: ModelConfig, quantize_lm_head: bool = False) -> Scheme:
        """What the shards of a model would hold; bf16 without a kind. Raises InputError for what no format has."""
        from quantize.shards.scheme import Scheme, default_scheme

        kind = self.kind or "bf16"
        if self.group_size is None:
            return default_scheme(kind, config, quantize_lm_head, self.zero_points)
        size = None if self.group_size == CHANNEL else int(self.group_size)
        return Scheme(find_format(kind, size, self.zero_points).name, quantize_lm_head)

    def agrees(self, scheme: Scheme) -> bool:
        """Whether a scheme is as asked for: any is where no kind was, and a mixture only then."""
        if self.kind is None:
            return True
        weights = scheme.default_format
        size = str(weights.group_size or CHANNEL)
        return (
            not scheme.overrides
            and self.kind == weights.kind
            and self.group_size in (None, size)
            and (weights.zero_points or not self.zero_points)
        )

    @property
    def flags(self) -> str:
        """The options that were given."""
        size = f" --group-size {self.group_size}" if self.group_size else ""
        return f"--{self.kind}{size}{' --zero-points' if self.zero_points else ''}"


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one flag for each kind of format, as ``kind``, then ``group_size`` and ``zero_points``."""
    kinds = [
        click.option(f"--{kind.name}", is_flag=True, expose_value=False, callback=_choose, help=kind.help)
        for kind in KINDS.values()
    ]
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


def _choose(context: click.Context, option: click.Parameter, given: bool) -> None:
    """Make the flag of a kind the value of ``kind``, which only one may be."""
    chosen = context.params.setdefault("kind", None)
    if given and chosen is not None:
        raise click.UsageError(f"Give --{chosen} or --{option.name}, not both.")
    if given:
        context.params["kind"] = option.name
