"""Linears of low-bit weights for TPUs: the inputs are cut into pieces, and the product sums over both axes at once.

A weight [out, in] is held as [pieces, size, out]: a piece is ``size`` consecutive inputs, and a group, whose inputs
share a scale for each output, is one piece or several. The TPU's compiler computes a product that sums over pieces and
their inputs in one fusion with what is done to the weight, which it reads as it is stored. All other forms lose by its
estimate: a weight [in, out] whose groups are made by reshaping it is written to memory in bfloat16 first, at seven to
sixteen times the cost, and sums scaled group by group cost nine times as much for a prompt.

Pieces of 64 inputs are good on all generations (v4, v5e, v6e, 7x). Those of 128 take up to 1.9 times as long, and those
of 32 up to 1.5 times, so a group of 128 is two pieces, and a weight with one scale for each output is cut as well. (For
that one v6e is an eighth faster with pieces of 256, v5e as much slower.)

The product's result is ``kept_in_shape``: else the compiler gives it the shape that what follows brings it to, heads
or the next weight's pieces, turns the weight to fit, and writes it to memory in bfloat16 for that.

Scales are float32. Of bfloat16 the compiler makes a float32 copy before every product, which takes a tenth longer.

Zero points are float32 too, and subtracted from every value. Taken off after the product, as a product of each group's
sum of inputs, they take a sixth longer on v5e in a decode step and two thirds longer in a bucket of 512, although a
linear by itself is faster so.

A device that splits a weight's inputs over chips splits the pieces and the groups, the first axes; outputs are the last
axis of all tensors.
"""

from __future__ import annotations

import torch
from torch import nn

from runtime.model.linears.linear import LinearWeight, Operations

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


def axis_in_pieces(axis: int | None, dimensions: int) -> int | None:
    """The axis along which a tensor of so many dimensions is split over chips that was split along ``axis``."""
    return {0: dimensions - 1, 1: 0, None: None}[axis]


class GroupedLinear(nn.Module):
    """y = x W^T, without a bias, for x [..., in] and a weight in pieces, floating or integers."""

    def __init__(self, weight: LinearWeight, operations: Operations) -> None:
        """Its values are as ``cut_into_pieces`` gives them, and its scale is float32 [groups, out]: the first axis of
        both is the groups. Or the scale is [out], one for all inputs of an output.

        Zero points have the scale's shape and dtype.
        """
        super().__init__()
        self.operations = operations
        self.register_buffer("weight", weight.values)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("weight_zero_point", weight.zero_points)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        y = self.operations.kept_in_shape(sum_of_products(rows, self._scaled(x.dtype)))
        if self.weight_scale.dim() == 1:
            y = y * self.weight_scale
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _scaled(self, dtype: torch.dtype) -> torch.Tensor:
        """What groups' values stand for, or the values of a weight without groups, in the shape that they have."""
        values = self.weight
        if self.weight_zero_point is not None:
            values = values.float() - self._by_group(self.weight_zero_point)
        if self.weight_scale.dim() == 2:
            values = values.float() * self._by_group(self.weight_scale)
        return values.to(dtype)

    def _by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor [groups, out], or [out], with as many axes as the values."""
        groups = len(tensor) if tensor.dim() == 2 else 1
        return tensor.view(groups, *[1] * (self.weight.dim() - 2), tensor.shape[-1])


def sum_of_products(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[R, out] of rows [R, in] and a weight of the same dtype in pieces, [pieces, size, out] or with groups before.

    In float32 it is a plain product, since a TPU computes an einsum's in bfloat16 (``attend_exactly``).
    """
    if rows.dtype == torch.float32:
        return rows @ weight.flatten(0, -2)
    axes = "gpi"[-weight.dim() + 1 :]
    return torch.einsum(f"r{axes},{axes}o->ro", rows.unflatten(-1, weight.shape[:-1]), weight)
