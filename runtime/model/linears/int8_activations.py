"""Linears whose activations are rounded to int8 as well, so that products are of integers."""

from __future__ import annotations

import torch
from torch import nn

from runtime.model.linears.linear import Operations

_QMAX = 127
_SMALLEST_UNIT = torch.finfo(torch.float32).tiny


class Int8ActivationsLinear(nn.Module):
    """y = x W^T, without a bias, for x [..., in] rounded to int8, and integers [out, in] with a scale for each output.

    The largest activation of every row becomes 127. Sums of products are int32: exact up to 130,000 inputs of int8.

    With ``parts`` greater than one, the inputs are that many equal parts, each with its own largest activation. So a
    weight whose inputs are split over as many chips needs nothing of other chips before the product, and what the chips
    then add up has the dtype of the activations.
    """

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, operations: Operations, parts: int = 1) -> None:
        """``values`` are int8 [out, in], ``scale`` float32 [out]."""
        super().__init__()
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scale)
        self.operations, self.parts = operations, parts

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
