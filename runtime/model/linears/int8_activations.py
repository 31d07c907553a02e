"""Linears whose activations are rounded to int8 as well, so that products are of integers."""

from __future__ import annotations

import torch
from torch import nn

from runtime.model.linears.linear import LinearWeight, Operations

_QMAX = 127
_SMALLEST_UNIT = torch.finfo(torch.float32).tiny


class Int8ActivationsLinear(nn.Module):
    """y = x W^T, without a bias, for x [..., in] rounded to int8, and integers [out, in] with a scale for each output.

    The largest activation of every row becomes 127. Sums of products are int32: exact up to 130,000 inputs of int8.

    Where a weight's inputs are split over chips, each chip's part of a row has its own largest activation: the chips
    need nothing of each other before the product, and what they then add up has the dtype of the activations.
    """

    def __init__(self, weight: LinearWeight, operations: Operations) -> None:
        """Values are integers of one byte [out, in], scales float32 [out]."""
        super().__init__()
        self.register_buffer("weight", weight.values)
        self.register_buffer("weight_scale", weight.scale)
        self.operations = operations
        self.parts = operations.chips if weight.splits_inputs else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.parts, x.shape[-1] // self.parts).transpose(0, 1)  # [parts, R, in / parts]
        weight = self.weight.unflatten(-1, (self.parts, -1)).transpose(0, 1)  # [parts, out, in / parts]
        values, unit = rounded_to_int8(rows)
        sums = self.operations.integer_product(values, weight)  # [parts, R, out]
        y = (sums.float() * unit * self.weight_scale).to(x.dtype)
        y = y[0] if self.parts == 1 else y.sum(0)
        return y.reshape(*x.shape[:-1], -1)


def rounded_to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., in] in int8, and the unit of each, float32 [..., 1]: the row is its int8 times its unit."""
    rows = rows.float()
    unit = (rows.abs().amax(-1, keepdim=True) / _QMAX).clamp(min=_SMALLEST_UNIT)
    return (rows / unit).round().to(torch.int8), unit
