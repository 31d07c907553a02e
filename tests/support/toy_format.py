"""A weight format that the product doesn't have: 4 bits, a scale for each 32 inputs, two values packed to a byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantize.formats.table import FORMATS, KINDS, Kind
from quantize.formats.weight_format import Encoded, Part, RowErrors

GROUP = 32


@dataclass(frozen=True)
class Toy:
    """Values from -7 to 7 in packed words; float32 scales."""

    kind = name = "toy"
    group_size = GROUP
    zero_points = False
    searches = False
    quantizes = True
    config_group = None
    parts = (Part("_packed", "int8", packed_axis=1), Part("_scale", "float32", inputs=GROUP))

    def encode(self, weight: torch.Tensor, search: bool = True, importance: torch.Tensor | None = None) -> Encoded:
        groups = weight.float().unflatten(1, (-1, GROUP))  # [n, in / 32, 32]
        scale = groups.abs().amax(-1, keepdim=True) / 7
        scale[scale == 0] = 1
        values = (groups / scale).round()
        error = (values * scale - groups).flatten(1).double()
        squared = groups.flatten(1).double().square().sum(1)
        errors = RowErrors(error.square().sum(1), squared, error.abs().amax(1))
        return Encoded({"_packed": values.flatten(1).to(torch.int8), "_scale": scale.squeeze(-1)}, errors)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values, scale = tensors["_packed"].float(), tensors["_scale"]
        return (values.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)


def register() -> None:
    """Add it to the tables of formats and kinds of this process."""
    FORMATS[Toy.name] = Toy()
    KINDS[Toy.kind] = Kind(Toy.kind, "")
