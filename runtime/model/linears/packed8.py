"""8-bit weights for Inductor on a CPU that PyTorch has no kernel for: integers in groups, and float8_e4m3fn.

The weight stays [out, in], as in the files. Up to ``LOOP_ROWS`` rows are written as products and sums, of which
Inductor makes one loop (see ``packed.py``); for more the weight is decoded once, to the rows' dtype, and the library's
product of matrices is used. Inductor's own conversion of float8 takes twice as long as the whole loop with the one
below, which puts the bits where float32 has them.
"""

from __future__ import annotations

import torch
from torch import nn

from runtime.model.linears.linear import LinearWeight
from runtime.model.linears.packed import in_memory

LOOP_ROWS = 16  # the most rows for the loop; up to there converting costs more
_FP8_EXPONENT, _FP8_MAGNITUDE = 0x78, 0x7F  # masks of e4m3's bits
_FP8_TO_FLOAT32 = 20, 120 << 23  # how far its bits are from float32's, and the exponents from each other
_FP8_SMALLEST = 2.0**-6  # of its normal numbers


class Packed8Linear(nn.Module):
    """y = x W^T, without a bias, for x [..., in] and values [out, in]."""

    def __init__(self, weight: LinearWeight) -> None:
        """Values are int8 or float8_e4m3fn; scales [out] or [out, groups], and zero points int8 of the same shape."""
        super().__init__()
        self.is_float = weight.values.dtype == torch.float8_e4m3fn
        self.register_buffer("weight", weight.values.view(torch.int8))
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_points", weight.zero_points)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        y = self._loop(rows) if len(rows) <= LOOP_ROWS else self._product(rows)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _loop(self, rows: torch.Tensor) -> torch.Tensor:
        scale = self.scale.float()
        weight = self._decoded()
        rows = rows.float()
        if scale.dim() == 2:
            weight = weight.unflatten(1, (scale.shape[1], -1))  # [out, groups, inputs]
            rows = rows.unflatten(1, (scale.shape[1], -1))
        totals = in_memory(rows.sum(-1))  # [R] or [R, groups]
        sums = []
        for row, total in zip(in_memory(rows), totals, strict=True):
            terms = (weight * row).sum(-1)
            if self.zero_points is not None:
                terms = terms - self.zero_points.float() * total
            terms = terms * scale
            sums.append(terms.sum(-1) if scale.dim() == 2 else terms)
        return torch.stack(sums)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        by_group = self.scale.dim() == 2
        weight = self._decoded()
        if by_group:
            weight = weight.unflatten(1, (self.scale.shape[1], -1))
        if self.zero_points is not None:
            weight = weight - self.zero_points.float().unsqueeze(-1)  # exact in bfloat16 as well
        if by_group:
            weight = (weight * self.scale.float().unsqueeze(-1)).flatten(1)
        y = nn.functional.linear(rows, weight.to(rows.dtype))
        return y if by_group else y * self.scale

    def _decoded(self) -> torch.Tensor:
        """The values in float32, [out, in]."""
        if not self.is_float:
            return self.weight.float()
        codes = self.weight.int()
        shift, exponents = _FP8_TO_FLOAT32
        size = (((codes & _FP8_MAGNITUDE) << shift) + exponents).view(torch.float32)
        size = torch.where((codes & _FP8_EXPONENT) == 0, 2 * size - _FP8_SMALLEST, size)  # subnormal numbers
        return torch.where(codes < 0, -size, size)
