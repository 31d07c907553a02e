"""Weights that another tool has quantized: which are kept as they are, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from converters.console.errors import InputError
from converters.console.notes import note
from converters.console.units import format_bytes
from converters.model.config import ModelConfig
from converters.model.parameters import LM_HEAD
from converters.sources.codes import CodedSource
from converters.sources.source import TensorSource
from quantize.formats.table import format_of
from quantize.formats.weight_format import WeightFormat
from quantize.shards.scheme import UNQUANTIZED, Scheme, choices, mixture
from quantize.shards.stored import StoredParameter, stored_parameters

if TYPE_CHECKING:
    from pathlib import Path

_SHOWN_NAMES = 3  # of many, in a note
_REASON = "not kept: "  # begins what stands in place of a format's name


class Kept:
    """What a quantized source holds in which format."""

    def __init__(self, source: CodedSource) -> None:
        self._source = source
        self._titles = source.titles(source.config)
        self._found = cache(self._look)

    def holds(self, name: str, weight_format: WeightFormat) -> bool:
        """Whether the source holds a weight in just this format. May read its scales, once."""
        return name in self._titles and self._found(name) == weight_format.name

    def formats(self, config: ModelConfig) -> dict[str, str]:
        """By name, the linears that can be kept, of those that a format can be chosen for, and in which format."""
        found = {name: self._found(name) for name in choices(config) if name in self._titles}
        return {name: each for name, each in found.items() if not each.startswith(_REASON)}

    def reasons(self, config: ModelConfig) -> list[str]:
        """Why linears can't be kept, each reason once, with how the source holds them."""
        why = (f"{self._titles[name]}: {self._found(name)}" for name in choices(config) if name in self._titles)
        return [each.replace(_REASON, "") for each in dict.fromkeys(why) if _REASON in each]

    def note(self, config: ModelConfig, scheme: Scheme) -> None:
        """Say which weights are kept, dequantized, quantized again, or here beside kept ones."""
        stored = {each.name: each for each in stored_parameters(config, scheme)}
        held = {name: self._titles[name] for name in stored if name in self._titles}
        wanted = {name for name, each in stored.items() if each.format.quantizes}
        kept = {name for name in held if name in wanted and self.holds(name, stored[name].format)}
        for form in dict.fromkeys(stored[name].format.name for name in kept):
            names = {name for name in kept if stored[name].format.name == form}
            note(f"{form} values and scales are kept as the source has them: {listed(names)}.")
        here = wanted - held.keys()
        if held and here:
            formats = " or ".join(each.name for each in scheme.formats)
            note(f"Quantized here, since the source does not hold them in {formats}: {listed(here)}.")
        self._note_again({name: held[name] for name in held.keys() & wanted - kept}, stored)
        self._note_dequantized({name: held[name] for name in held.keys() - wanted}, stored, config, bool(wanted))

    def _note_again(self, held: Mapping[str, str], stored: Mapping[str, StoredParameter]) -> None:
        """Say which weights are rounded a second time, and why they aren't kept."""
        for why, names in _by_value({name: self._why(name, stored[name].format) for name in held}).items():
            titles = " and ".join(sorted({held[name] for name in names}))
            forms = " and ".join(sorted({stored[name].format.name for name in names}))
            note(f"A second rounding, from the source's {titles}, to {forms}: {listed(names)}{why}.")

    def _why(self, name: str, wanted: WeightFormat) -> str:
        found = self._found(name)
        return f" ({found.removeprefix(_REASON)})" if found.startswith(_REASON) else f" (--keep keeps it as {found})"

    def _note_dequantized(
        self, held: Mapping[str, str], stored: Mapping[str, StoredParameter], config: ModelConfig, quantizes: bool
    ) -> None:
        """Say which weights are no longer quantized, and what that takes."""
        hint = " --quantize-lm-head keeps lm_head.weight." if quantizes and LM_HEAD.name in held else ""
        for title, names in _by_value(held).items():
            size = sum(tensor.whole_spec.nbytes for name in names for tensor in stored[name].tensors)
            reasons = {self._found(name) for name in names} if quantizes else set()
            why = "; ".join(sorted(each.removeprefix(_REASON) for each in reasons if each.startswith(_REASON)))
            note(
                f"Dequantized from the source's {title}, to {config.dtype}, {format_bytes(size)} in all: "
                f"{listed(names)}{f' ({why})' if why else ''}.{hint}"
            )

    def _look(self, name: str) -> str:
        """The name of the format that a weight can be kept in; or, behind _REASON, why it can't."""
        coding = self._source.coding(name)
        if isinstance(coding, str):
            return _REASON + coding
        found = format_of(coding)
        if found is None:
            groups = "a scale for each output" if coding.group_size is None else f"groups of {coding.group_size}"
            return f"{_REASON}no format here has {coding.kind} with {groups} and {coding.scales} scales"
        return found.name


def keeping(source: TensorSource, config: ModelConfig, where: Path, rest: Scheme | None) -> Scheme:
    """The scheme that keeps what can be of a quantized source. The others are as in ``rest``, or not quantized.

    Raises InputError where there is nothing to keep.
    """
    if not isinstance(source, CodedSource):
        raise InputError(f"--keep keeps what another tool has quantized, and {where} holds nothing such. Leave it out.")
    kept = Kept(source)
    formats = kept.formats(config)
    if not formats:
        why = "; ".join(kept.reasons(config))
        raise InputError(f"--keep: nothing that {where} holds can be kept ({why}). Give a format in its place.")
    others = {name: each for name, each in choices(config).items() if name not in formats}
    for name, each in others.items():
        if rest is not None and rest.covers(each):
            formats[name] = rest.format_of(each, config).name
        elif each.row.quantized:
            formats[name] = UNQUANTIZED
    return mixture(config, formats)


def listed(names: Iterable[str]) -> str:
    """The first names, and how many there are."""
    found = sorted(names)
    more = len(found) - _SHOWN_NAMES
    return ", ".join(found[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _by_value(of: Mapping[str, str]) -> dict[str, set[str]]:
    """The names that have each value."""
    found: dict[str, set[str]] = {}
    for name, value in sorted(of.items()):
        found.setdefault(value, set()).add(name)
    return found
