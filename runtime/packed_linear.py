"""Linears in the form that Inductor runs at memory speed on a CPU: weights as they are, a kernel by number of rows.

The weight stays [out, in], as in the files. int8 is read as int8 for a few rows:

- bfloat16 rows go to PyTorch's weight-only kernel (``_weight_int8pack_mm``), with a scale of one: it would round the
  scale to bfloat16, so that is applied after it, in float32;
- float32 rows, for which that kernel has no vector instructions, and a single row on a floating weight, are written
  as a product and a sum, which Inductor makes a loop of that converts as it reads; its library call for a
  bfloat16 weight and one row takes twice as long.

For many rows the weight is converted once and multiplied by the library's matrix product.
"""

from __future__ import annotations

import torch
from torch import nn

KERNEL_ROWS = 24  # at most; the weight-only kernel reads the weight once for every four rows
LOOP_ROWS = 8  # at most; the loop reads it once for each
_KERNEL_INPUTS = 16  # the kernel takes so many at a time and drops what is left


class PackedLinear(nn.Module):
    """y = x W^T for a weight [out, in] and x [..., in], without a bias; a weight with a scale [out] is int8."""

    def __init__(self, weight: torch.Tensor, weight_scale: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        packs = weight.dtype == torch.int8 and weight.shape[1] % _KERNEL_INPUTS == 0
        self.register_buffer("ones", torch.ones(len(weight), dtype=torch.bfloat16) if packs else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        y = self._product(rows)
        if self.weight_scale is not None:
            y = y * self.weight_scale
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, out], before the scale."""
        if self.ones is not None and rows.dtype == torch.bfloat16 and len(rows) <= KERNEL_ROWS:
            return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.ones)
        if len(rows) == 1 or (self.weight.dtype == torch.int8 and len(rows) <= LOOP_ROWS):
            return (self.weight.float() * rows.float()[:, None]).sum(-1)
        return nn.functional.linear(rows, self.weight.to(rows.dtype))
