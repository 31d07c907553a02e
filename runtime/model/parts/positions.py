"""How positions enter the model: vectors added to token embeddings, or rotations of queries and keys.

Each kind is a module with the methods of NoPositions, made from a model's weights, its configuration, a function that
moves a host tensor to the device, and that device's form. A token's position is its slot minus its row's offset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from converters.model.architecture import Positions
from converters.model.config import ModelConfig
from converters.model.parameters import POSITIONS
from converters.model.rope import inverse_frequencies
from runtime.model.device_form import Form
from runtime.model.parts.rotary import Rotary, cos_and_sin
from runtime.model.weights import Weights

Place = Callable[[torch.Tensor], torch.Tensor]


class NoPositions(nn.Module):
    """The interface of a kind of positions; this one adds and rotates nothing."""

    def added(self, slots: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor | None:
        """Float32 [B, T, E] to add to the token embeddings, for ``slots`` [T] and ``offsets`` [B]; None for nothing."""
        return None

    def rotary(self, slots: torch.Tensor, offsets: torch.Tensor) -> Rotary | None:
        """cos and sin [B, T, D] of the angles by which queries and keys are rotated; None for no rotation."""
        return None


class RotaryPositions(NoPositions):
    """Rotary embeddings, whose frequencies follow from the configuration."""

    def __init__(self, weights: Weights, config: ModelConfig, place: Place, form: Form) -> None:
        super().__init__()
        self.form = form
        frequencies = torch.tensor(inverse_frequencies(config), dtype=torch.float32)  # [D / 2]
        self.register_buffer("frequencies", place(frequencies))

    def rotary(self, slots: torch.Tensor, offsets: torch.Tensor) -> Rotary:
        cos, sin = cos_and_sin(slots[None] - offsets[:, None], self.frequencies)
        return self.form.materialize(cos), self.form.materialize(sin)


class LearnedPositions(NoPositions):
    """A table of learned vectors; position 0 is in row ``position_offset``."""

    def __init__(self, weights: Weights, config: ModelConfig, place: Place, form: Form) -> None:
        super().__init__()
        self.offset = config.architecture.position_offset
        self.register_buffer("table", weights.take(config.architecture.prefix + POSITIONS.name))  # [P, E]

    def added(self, slots: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        positions = (slots[None] - offsets[:, None]).clamp(min=0)  # [B, T]; before a row's start any will do
        return nn.functional.embedding(positions + self.offset, self.table).float()


MakePositions = Callable[[Weights, ModelConfig, Place, Form], NoPositions]
POSITION_KINDS: Mapping[Positions, MakePositions] = {
    Positions.ROTARY: RotaryPositions,
    Positions.LEARNED: LearnedPositions,
}
