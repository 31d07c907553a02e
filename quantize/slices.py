"""TPU slices by name, as --target takes them: generation, chips and how these are wired up."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from converters.console.errors import InputError

# What the number in a slice's name counts, per chip: TensorCores in v4 and v5p, chips in v5e and v6e
# (cloud.google.com/tpu/docs: v4, v5p, v5e, v6e).
_NAME_UNITS_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
# Default shapes (docs: supported TPU configurations): v4 and v5p a 3D mesh, from 4x4x4 on a torus; v5e and v6e 2D. v5p
# goes on to 6144 chips, more than shards can be made for.
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
_SHAPES = {"v4": _SHAPES_3D, "v5p": _SHAPES_3D, "v5e": _SHAPES_2D, "v6e": _SHAPES_2D}
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


def target_chips(target: str) -> int:
    """``v4-16`` -> 8. Raises InputError for a name that isn't a slice's."""
    return find_slice(target).chips
