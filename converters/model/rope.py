"""Rotary embeddings (Su et al. 2021): their frequencies, and the rules that scale them for longer contexts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any, ClassVar

from converters.console.errors import InputError, shown
from converters.console.notes import note
from converters.model.hf_fields import MAX_POSITIONS

if TYPE_CHECKING:
    from converters.model.config import ModelConfig

_THETA = 10000.0  # where config.json is silent
_ORIGINAL = "original_max_position_embeddings"
_MAX_FACTOR = 10**6
_MAX_POSITIONS = 1 << 24


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    kind: ClassVar[str] = "linear"
    factor: float

    def __post_init__(self) -> None:
        _check_number("factor", self.factor, 1)

    def scale(self, frequency: float) -> float:
        """The frequency, in radians per position, that takes the place of ``frequency``."""
        return frequency / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's rule: short waves stay, long ones are stretched by ``factor``, those between are blended.

    Waves are long or short against the original context: longer than 1 / ``low_freq_factor`` of it, or shorter than
    1 / ``high_freq_factor``. Source: ``apply_scaling`` in Meta's reference code of LLaMA 3.1.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_number("factor", self.factor, 1)
        _check_number("low_freq_factor", self.low_freq_factor, 0)
        _check_number("high_freq_factor", self.high_freq_factor, 0)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                f"RoPE scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; the low one must be positive and below the high one."
            )
        positions = self.original_max_position_embeddings
        if type(positions) is not int or not 1 <= positions <= _MAX_POSITIONS:
            raise InputError(
                f"RoPE scaling has original_max_position_embeddings {shown(positions)}; "
                f"it must be a whole number from 1 to {_MAX_POSITIONS}."
            )

    def scale(self, frequency: float) -> float:
        """The frequency, in radians per position, that takes the place of ``frequency``."""
        waves = self.original_max_position_embeddings * frequency / (2 * math.pi)  # in the original context
        blend = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = min(1.0, max(0.0, blend))
        return frequency * (blend + (1 - blend) / self.factor)


RopeScaling = LinearScaling | Llama3Scaling
_RULES: dict[str, type[LinearScaling] | type[Llama3Scaling]] = {
    rule.kind: rule for rule in (LinearScaling, Llama3Scaling)
}


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """The angles, in radians per position, by which the pairs of a head's dimensions turn: head_dim / 2 of them.

    Pair i turns by rope_theta ** (-2 i / head_dim), scaled as the configuration says. Computed in float64.
    """
    plain = [config.rope_theta ** (-2 * pair / config.head_dim) for pair in range(config.head_dim // 2)]
    return plain if config.rope_scaling is None else [config.rope_scaling.scale(frequency) for frequency in plain]


def scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    """The ``rope_scaling`` of a config.json."""
    return {"rope_type": scaling.kind, **asdict(scaling)}


def rope_from_hf(fields: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """The base of the frequencies (to be checked by the caller) and their scaling, from the fields of a config.json.

    Transformers up to version 4 writes ``rope_theta`` and ``rope_scaling`` (older: with ``type`` for ``rope_type``), 5
    and later ``rope_parameters``, which holds both. Where fields contradict each other, the one counts that counts in
    transformers 5, with a note. Raises InputError for rules that are not implemented, by name.
    """
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"config.json has a {key} that is not one set of RoPE parameters for all layers.")
    for place in (fields, rope):
        if place.get("partial_rotary_factor") not in (None, 1):
            raise InputError("config.json asks for rotary embeddings of a part of each head (partial_rotary_factor).")
    other = fields.get("rope_parameters")
    if key == "rope_scaling" and isinstance(other, dict) and other and _plain(other, fields) != _plain(rope, fields):
        note("config.json has a rope_scaling and another rope_parameters: rope_scaling counts, as in transformers.")
    return _theta(rope, fields, key), _read_scaling(rope, fields)


def _kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type") or "default"


def _plain(rope: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """A set of RoPE parameters, the same for all ways to write the same."""
    theta = rope.get("rope_theta") or fields.get("rope_theta") or _THETA
    return {**rope, "type": None, "rope_type": _kind(rope), "rope_theta": theta}


def _theta(rope: dict[str, Any], fields: dict[str, Any], key: str) -> Any:
    inner, outer = rope.get("rope_theta"), fields.get("rope_theta")
    if None not in (inner, outer) and inner != outer:
        note(f"config.json has rope_theta {shown(outer)}, and {shown(inner)} in {key}: {shown(inner)} counts.")
    theta = outer if inner is None else inner
    return _THETA if theta is None else theta


def _read_scaling(rope: dict[str, Any], fields: dict[str, Any]) -> RopeScaling | None:
    kind, older = _kind(rope), rope.get("type")
    if older not in (None, kind):
        note(f"config.json asks for RoPE of rope_type {shown(kind)} and of type {shown(older)}: the first counts.")
    if kind == "default":
        return None
    rule = _RULES.get(kind) if isinstance(kind, str) else None
    if rule is None:
        known = ", ".join(repr(name) for name in ("default", *_RULES))
        raise InputError(f"config.json asks for RoPE scaling of type {shown(kind)}; implemented: {known}.")
    values = {field.name: rope.get(field.name) for field in dataclass_fields(rule)}
    if _ORIGINAL in values:
        values[_ORIGINAL] = _original_positions(values[_ORIGINAL], fields)
    absent = [name for name, value in values.items() if value is None]
    if absent:
        raise InputError(f"config.json asks for RoPE scaling of type {kind!r} without {', '.join(absent)}.")
    return rule(**values)


def _original_positions(inner: Any, fields: dict[str, Any]) -> Any:
    """The length that a scaling starts from: a field of config.json itself counts before the scaling's own."""
    outer = fields.get(_ORIGINAL)
    if outer is not None:
        if inner not in (None, outer):
            note(f"config.json has {_ORIGINAL} {shown(outer)}, and {shown(inner)} for RoPE: {shown(outer)} counts.")
        return outer
    if inner is None:
        inner = fields.get("max_position_embeddings") or MAX_POSITIONS
        note(f"config.json scales RoPE without {_ORIGINAL}: max_position_embeddings, {shown(inner)}, takes its place.")
    return inner


def _check_number(name: str, value: Any, low: float) -> None:
    if type(value) not in (int, float) or not low <= value <= _MAX_FACTOR:  # neither is true of NaN
        raise InputError(f"RoPE scaling has {name} {shown(value)}; it must be a number from {low} to {_MAX_FACTOR}.")
