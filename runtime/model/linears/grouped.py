"""Linears of low-bit weights for TPUs: the inputs are cut into pieces, and the product sums over both axes at once.

A weight [out, in] is held as [pieces, size, out]: a piece is ``size`` consecutive inputs, and a group, whose inputs
share a scale for each output, is one piece or several. The TPU's compiler computes a product that sums over pieces and
their inputs in one fusion with what is done to the weight, which it reads as it is stored. All other forms lose by its
estimate: a weight [in, out] whose groups are made by reshaping it is written to memory in bfloat16 first, at five to
twenty times the cost, and sums scaled group by group cost ten times as much for a prompt.

``PIECE`` inputs are best on all generations (v4, v5e, v6e, 7x). Pieces of 128 take up to 1.9 times as long, and those
of 32 up to 1.5 times, so a group of 128 is two pieces, and a weight with one scale for each output is cut as well.

Zero points are taken off after the product, as a small product of each group's sum of inputs: subtracted from every
value, they cost a fifth more.

A device that splits a weight's inputs over chips splits the pieces and the groups, the first axes; outputs are the last
axis of all tensors.
"""

from __future__ import annotations

import torch
from torch import nn

PIECE = 64  # inputs of a piece, the most


def piece_size(inputs: int) -> int:
    """The size of the pieces for groups of so many inputs, or for a chip's inputs where they have no groups."""
    return next(size for size in range(min(PIECE, inputs), 0, -1) if inputs % size == 0)


def cut_into_pieces(values: torch.Tensor, group: int | None = None) -> torch.Tensor:
    """One chip's values [out, in] as [pieces, size, out], in memory in that order.

    For groups of ``group`` inputs that are larger than a piece, [groups, pieces of each, size, out]. Raises ValueError
    where the inputs aren't whole groups.
    """
    out, inputs = values.shape
    if inputs % (group or inputs):
        raise ValueError(f"{inputs} inputs are no whole groups of {group}")
    size = piece_size(group or inputs)
    pieces = values.T.contiguous().view(-1, size, out)
    return pieces if group in (None, size) else pieces.unflatten(0, (inputs // group, -1))


class GroupedLinear(nn.Module):
    """y = x W^T, without a bias, for x [..., in] and a weight in pieces, floating or integers."""

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, zero_points: torch.Tensor | None = None) -> None:
        """``values`` are as ``cut_into_pieces`` gives them, and ``scale`` is [groups, out]: the first axis of both is
        the groups. Or ``scale`` is [out], one for all inputs of an output.

        ``zero_points`` [groups, out] are what stands for zero in each group; None where that is zero.
        """
        super().__init__()
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", zero_points)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        weight = self.weight.to(x.dtype)
        if self.weight_scale.dim() == 2:
            groups, out = self.weight_scale.shape
            between = [1] * (weight.dim() - 2)
            weight = weight * self.weight_scale.to(x.dtype).view(groups, *between, out)
        y = sum_of_products(rows, weight)
        if self.weight_scale.dim() == 1:
            y = y * self.weight_scale
        if self.weight_zero_point is not None:
            y = y.float() - self._zeros(rows)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _zeros(self, rows: torch.Tensor) -> torch.Tensor:
        """What the products [R, out] have too much where the values' zero isn't 0, in float32."""
        scale = self.weight_scale.to(rows.dtype)
        sums = rows.float().unflatten(-1, (scale.shape[0], -1)).sum(-1)  # [R, groups]
        zeros = self.weight_zero_point.to(rows.dtype) * scale
        if rows.dtype == torch.float32:
            return sums @ zeros
        high = sums.to(rows.dtype)  # a second product has what rounding the sums leaves
        low = (sums - high.float()).to(rows.dtype)
        both = torch.cat([high, low]) @ zeros
        return both[: len(rows)].float() + both[len(rows) :].float()


def sum_of_products(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[R, out] of rows [R, in] and a weight of the same dtype in pieces, [pieces, size, out] or with groups before.

    In float32 it is a plain product, since a TPU computes an einsum's in bfloat16 (``attend_exactly``).
    """
    if rows.dtype == torch.float32:
        return rows @ weight.flatten(0, -2)
    axes = "gpi"[-weight.dim() + 1 :]
    return torch.einsum(f"r{axes},{axes}o->ro", rows.unflatten(-1, weight.shape[:-1]), weight)
