"""Linears in the form that Inductor runs at memory speed on a CPU: weights as they are, a kernel by number of rows.

The weight stays [out, in], as in the files. int8 is read as int8 for a few rows:

- one row, or several that stay in the processor's nearest cache, are products and sums, which Inductor makes one loop
  of: it converts the weight as it reads, in the order in which it stands in memory. The rows have to be in memory in
  float32 before it, or the loop would compute them anew for every output, and with lanes of bfloat16's width, in which
  int8 is read through a copy;
- more bfloat16 rows go to PyTorch's weight-only kernel (``_weight_int8pack_mm``), with a scale of one: it would round
  the scale to bfloat16, so that is applied after it, in float32. It has no vector instructions for float32 rows.

For many rows the weight is converted once and multiplied by the library's matrix product. A single row on a floating
weight takes the loop too: Inductor's library call for bfloat16 takes twice as long.
"""

from __future__ import annotations

import torch
from torch import nn

from runtime.model.linears.linear import LinearWeight

LOOP_ROWS = 8  # at most; each is a sum more to compile
LOOP_INPUTS = 8192  # at most of all rows together where there is a kernel: 32 KB in float32
KERNEL_ROWS = 24  # at most; the weight-only kernel reads the weight once for every four rows
_KERNEL_INPUTS = 16  # the kernel takes so many at a time and drops what is left


class PackedLinear(nn.Module):
    """y = x W^T for a weight [out, in] and x [..., in], without a bias; a weight with a scale [out] is int8."""

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
        """[R, out], before the scale."""
        has_kernel = self.ones is not None and rows.dtype == torch.bfloat16
        are_few = len(rows) <= LOOP_ROWS and (rows.numel() <= LOOP_INPUTS or not has_kernel)
        if len(rows) == 1 or (self.weight.dtype == torch.int8 and are_few):
            weight = self.weight.float()
            return torch.stack([(weight * row).sum(-1) for row in _in_memory(rows.float())])
        if has_kernel and len(rows) <= KERNEL_ROWS:
            return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.ones)
        return nn.functional.linear(rows, self.weight.to(rows.dtype))


def _in_memory(rows: torch.Tensor) -> torch.Tensor:
    """The same, which Inductor then writes out: it would compute the rows anew within the loop, for every output."""
    rows = rows.contiguous()
    return rows.as_strided(rows.shape, rows.stride())
