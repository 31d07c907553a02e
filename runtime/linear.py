"""A linear layer that reads its weight as int8 with a scale per output channel, or in a floating dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# From a weight and its scale (None where it isn't quantized) to a module of the form that a device wants.
MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]


class Linear(nn.Module):
    """y = x W^T for a weight [out, in] and x [..., in], without a bias.

    A weight with a scale (float32 [out, 1]) is int8. The weight is converted where it is used: XLA fuses the
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
        return (y * self.weight_scale.squeeze(1)).to(x.dtype)


class PaddedLinear(Linear):
    """A linear that never has a single row: TPUs give one to their vector unit, which takes up to five times as long.

    The row is put in twice and taken out once; the matrix unit takes as long for two rows as for eight.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() > x.shape[-1]:
            return super().forward(x)
        row = x.reshape(1, -1)  # [1, in]
        return super().forward(torch.cat([row, row]))[:1].reshape(*x.shape[:-1], -1)
