"""A weight format that the product doesn't have: 4 bits, a scale for each 32 inputs, two values packed to a byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantize.formats.table import FORMATS
from quantize.formats.weight_format import Encoded, Part, RowErrors

GROUP = 32


@dataclass(frozen=True)
class Toy:
    """Values from -7 to 7, the low half of each byte before the high one, 8 added; float32 scales."""

    name = "toy"
    quantizes = True
    config_group = None
    parts = (Part("_packed", "uint8", inputs=2, fill=0x88), Part("_scale", "float32", inputs=GROUP, is_shared=True))

    def encode(self, weight: torch.Tensor) -> Encoded:
        groups = weight.float().unflatten(1, (-1, GROUP))  # [n, in / 32, 32]
        scale = groups.abs().amax(-1, keepdim=True) / 7
        scale[scale == 0] = 1
        values = (groups / scale).round()
        error = (values * scale - groups).flatten(1).double()
        squared = groups.flatten(1).double().square().sum(1)
        errors = RowErrors(error.square().sum(1), squared, error.abs().amax(1))
        low, high = (values.flatten(1) + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
        return Encoded({"_packed": low | high << 4, "_scale": scale.squeeze(-1)}, errors)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        packed, scale = tensors["_packed"], tensors["_scale"]
        values = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).float() - 8  # [n, in]
        return (values.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)


def register() -> None:
    """Add it to the table of formats of this process."""
    FORMATS[Toy.name] = Toy()
