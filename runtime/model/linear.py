"""A linear layer that reads its weight as int8 with a scale per output channel, or in a floating dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# From a weight and its scale (None where it isn't quantized) to a module of the form that a device wants.
MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]


class Linear(nn.Module):
    """y = x W^T for a weight [out, in] and x [..., in], without a bias.

    A weight with a scale (float32 [out]) is int8. The weight is converted where it is used: XLA fuses the
    conversion into the product on TPU, so int8 is what is read from memory.
    """

    def __init__(self, weight: torch.Tensor, weight_scale: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight.to(x.dtype))  # [..., out]
        if self.weight_scale is None:
            return y
        return (y * self.weight_scale).to(x.dtype)
