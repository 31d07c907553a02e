"""Linears that Inductor runs at memory speed on a CPU: the kernel depends on the number of rows.

The weight stays [out, in], as in the files. For a few rows, int8 is read as int8:

- one row, or several that fit in the processor's nearest cache, are written as products and sums. Inductor makes one
  loop of them, which reads the weight in memory order and converts it on the way. The rows must already be in memory in
  float32; otherwise the loop would recompute them for every output, and use lanes of bfloat16's width, for which int8
  is read through a copy;
- more bfloat16 rows go to PyTorch's weight-only kernel (``_weight_int8pack_mm``) with a scale of one: the kernel would
  round the real scale to bfloat16, so it is applied afterwards in float32. For float32 rows the kernel has no vector
  instructions.

For many rows the weight is converted once and the library's matrix product is used. A single row on a floating weight
takes the loop too: Inductor's library call for bfloat16 takes twice as long.
"""

from __future__ import annotations

import torch
from torch import nn

from runtime.model.linears.linear import LinearWeight

LOOP_ROWS = 8  # the most rows for the loop; each is one more sum to compile
LOOP_INPUTS = 8192  # the most inputs of all rows together where the kernel could be used: 32 KB in float32
KERNEL_ROWS = 24  # the most rows for the weight-only kernel, which reads the weight once for every four rows
_KERNEL_INPUTS = 16  # the kernel takes this many at a time and drops the remainder


class PackedLinear(nn.Module):
    """y = x W^T, without a bias, for x [..., in] and a weight [out, in]; a weight with a scale [out] is int8."""

    def __init__(self, weight: LinearWeight) -> None:
        super().__init__()
        values = weight.tensors[""]
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", weight.scale)
        packs = values.dtype == torch.int8 and values.shape[1] % _KERNEL_INPUTS == 0
        self.register_buffer("ones", torch.ones(len(values), dtype=torch.bfloat16) if packs else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        y = self._product(rows)
        if self.weight_scale is not None:
            y = y * self.weight_scale
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        """The product [R, out] with ``rows`` [R, in], before the scale."""
        has_kernel = self.ones is not None and rows.dtype == torch.bfloat16
        are_few = len(rows) <= LOOP_ROWS and (rows.numel() <= LOOP_INPUTS or not has_kernel)
        if len(rows) == 1 or (self.weight.dtype == torch.int8 and are_few):
            weight = self.weight.float()
            return torch.stack([(weight * row).sum(-1) for row in in_memory(rows.float())])
        if has_kernel and len(rows) <= KERNEL_ROWS:
            return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.ones)
        return nn.functional.linear(rows, self.weight.to(rows.dtype))


def in_memory(rows: torch.Tensor) -> torch.Tensor:
    """The rows unchanged, but written to memory by Inductor, which would else recompute them for every output."""
    rows = rows.contiguous()
    return rows.as_strided(rows.shape, rows.stride())
