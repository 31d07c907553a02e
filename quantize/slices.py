"""TPU slices by name, as --target takes them: generation, chips and how these are wired up.

What holds a shard is a device, as XLA counts them: a whole chip, but in tpu7x one of a chip's two halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from converters.console.errors import InputError
from converters.console.units import plural

# What the number in a slice's name counts, per chip: TensorCores in v4, v5p and tpu7x, chips in v5e and v6e
# (cloud.google.com/tpu/docs: v4, v5p, v5e, v6e, tpu7x).
_NAME_UNITS_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1, "tpu7x": 2}
# The two TensorCores of v4 and v5p are one device with one memory; each of tpu7x's has its own half of the chip's
# memory (cloud.google.com/tpu/docs/tpu7x: dual-chiplet architecture).
_DEVICES_PER_CHIP = {"v4": 1, "v5p": 1, "v5e": 1, "v6e": 1, "tpu7x": 2}
# Default shapes (docs: supported TPU configurations): v4, v5p and tpu7x a 3D mesh, from 4x4x4 on a torus; v5e and v6e
# 2D. v5p goes on to 6144 chips and tpu7x to 9216, more than shards can be made for.
_SHAPES_3D = (
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
    (4, 4, 4),
    (4, 4, 8),
    (4, 8, 8),
    (8, 8, 8),
    (8, 8, 16),
    (8, 16, 16),
    (16, 16, 16),
)
_SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SHAPES = {
    "v4": _SHAPES_3D,
    "v5p": _SHAPES_3D,
    "v5e": _SHAPES_2D,
    "v6e": _SHAPES_2D,
    "tpu7x": ((1, 1, 1), *_SHAPES_3D[:-1]),  # 16x16x16 would be 8192 devices
}
GENERATIONS = tuple(_SHAPES)
# The TPU API's own name of v5e.
_ALIASES = {"v5litepod": "v5e"}


@dataclass(frozen=True)
class Slice:
    """A slice of one TPU generation; ``shape`` is the extent of its inter-chip interconnect in every dimension."""

    generation: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return prod(self.shape)

    @property
    def devices(self) -> int:
        """The number of XLA devices, and so of shards: that of the chips, or twice as many."""
        return self.chips * self.devices_per_chip

    @property
    def devices_per_chip(self) -> int:
        return _DEVICES_PER_CHIP[self.generation]

    @property
    def size(self) -> str:
        """``8 chips``; ``8 devices on 4 chips`` where a chip is two devices."""
        chips = plural(self.chips, "chip")
        return chips if self.devices_per_chip == 1 else f"{plural(self.devices, 'device')} on {chips}"

    @property
    def name(self) -> str:
        """As Google Cloud names it: ``v4-16`` for 8 chips of two TensorCores."""
        return f"{self.generation}-{self.chips * _NAME_UNITS_PER_CHIP[self.generation]}"

    @property
    def topology(self) -> str:
        """``2x2x2``"""
        return "x".join(map(str, self.shape))


# Of every generation the smallest first.
SLICES = tuple(Slice(generation, shape) for generation in GENERATIONS for shape in _SHAPES[generation])


def find_slice(name: str) -> Slice:
    """The slice of this name, in any case. Raises InputError, listing all, where there is none."""
    generation, dash, number = name.lower().partition("-")
    wanted = _ALIASES.get(generation, generation) + dash + number
    for candidate in SLICES:
        if candidate.name == wanted:
            return candidate
    raise InputError(f"Unknown slice {name[:40]!r}; give one of {', '.join(each.name for each in SLICES)}.")


def device_word(generation: str) -> str:
    """What holds a shard in slices of a generation: ``chip``, or ``device`` where that is only a part of a chip."""
    return "chip" if _DEVICES_PER_CHIP[generation] == 1 else "device"
