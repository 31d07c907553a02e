"""Linears of 4- and 8-bit values that XLA:CPU runs at memory speed, as one sum of products for each output.

A single row is a vector. XLA:CPU makes one loop of a sum over elementwise operations, which decodes the values in
registers and goes over them in memory order, if its options (``devices/cpu/process.py``) leave the sum to its own
emitters. What makes that loop fast, for LLaMA 7B's linears (4 bits in groups of 128 take 0.65 of the time of int8 with
a scale for each output):

- lanes of a vector register are added up once for a chunk of groups, and not for each: within a chunk XLA is kept from
  making one sum of the two (it would add lanes up within the loop, one chunk after the other) by a product with ones
  that the compiler can't know to be ones;
- 4-bit values need no shift, and the offset of those in the low halves is taken off in the vector register;
- the row is prepared before the loop, which a division by such ones ensures (see ``tiled.py``), and what a loop needs
  of it stays in the nearest cache, since a weight is cut into pieces.

More rows use a matrix product for each half of the bytes, decoded to the activations' dtype some outputs at a time.
There, scales of groups are rounded into a bfloat16 weight, as everywhere in bfloat16; a scale for each output isn't.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from runtime.model.linears.codes import HIGH, LOW, OFFSET, Coded, Values
from runtime.model.linears.linear import LinearWeight, Operations
from runtime.model.linears.tiled import LEFT_ROWS

VECTOR_ROWS = {Values.INT4: 8, Values.INT8: 4, Values.FP8: 4}  # the most rows multiplied as vectors
_BLOCK = 1 << 20  # elements that are decoded at once of a piece which has at least twice as many
_FP8_UNIT = 256  # float16 reads the bits of e4m3 as numbers that are so many times smaller
_FP8_MASK = -16512  # of int16: its sign, four bits of an exponent and three of a mantissa
_HIGH_UNIT = 2.0**-4  # of the values that are read by HIGH


class _Piece(NamedTuple):
    """Values [..., out, chunks, groups, lanes], and the float32 scales and zero points of groups [..., 1], if any."""

    values: torch.Tensor
    scale: torch.Tensor | None
    zero_points: torch.Tensor | None

    def split(self, outputs: int) -> list[_Piece]:
        """Pieces of so many outputs each."""
        count = -(-self.values.shape[-4] // outputs)
        parts = [[None] * count if tensor is None else tensor.split(outputs, dim=-4) for tensor in self]
        return [_Piece(*part) for part in zip(*parts, strict=True)]


class SummedLinear(nn.Module):
    """y = x W^T, without a bias, for x [..., in]; summed in float32, returned in x's dtype."""

    def __init__(self, weight: LinearWeight, operations: Operations) -> None:
        """Values are ``Coded``; scales float32 [out], or of any floating dtype [out, groups]; zero points int8 of the
        same shape.

        Groups are those of the values' coding, of all chips together.
        """
        super().__init__()
        values: Coded = weight.values
        self.pieces = nn.ParameterList(nn.Parameter(piece, requires_grad=False) for piece in values.pieces)
        self.kind, self.halves = values.kind, values.halves
        self.operations = operations
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_points", weight.zero_points)
        self.register_buffer("ones", operations.ones(values.inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        y = self._products(rows)
        if self.scale.dim() == 1:
            if self.zero_points is not None:
                y = y - rows.float().sum(-1, keepdim=True) * self.zero_points
            y = y * self.scale
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _products(self, rows: torch.Tensor) -> torch.Tensor:
        """The products [R, out] of rows [R, in], in float32, before scales [out] and their zero points."""
        pieces = self._pieces()
        split = pieces[0].values.dim() == 5
        if split:
            rows = rows.unflatten(-1, (pieces[0].values.shape[0], -1)).transpose(0, 1)  # [chips, R, in / chips]
        parts = rows.split([self.halves * piece.values.shape[-3:].numel() for piece in pieces], dim=-1)
        multiply = self._vector_sums if rows.shape[-2] <= VECTOR_ROWS[self.kind] else self._matrix_products
        y = multiply(parts, pieces)  # [R, out] or [chips, R, out]
        return y.sum(0) if split else y

    def _pieces(self) -> list[_Piece]:
        values = list(self.pieces)
        counts = [piece.shape[-3] * piece.shape[-2] for piece in values]
        scales, zeros = (
            [None] * len(values) if tensor is None or tensor.dim() == 1 else self._by_chip(tensor).split(counts, dim=-1)
            for tensor in (self.scale, self.zero_points)
        )
        pieces = []
        for piece, *by_group in zip(values, scales, zeros, strict=True):
            shape = (*piece.shape[-3:-1], 1)  # chunks, groups, 1
            pieces.append(_Piece(piece, *(t if t is None else t.float().unflatten(-1, shape) for t in by_group)))
        return pieces

    def _by_chip(self, tensor: torch.Tensor) -> torch.Tensor:
        """Scales or zero points [out, groups], or [chips, out, groups / chips] where inputs are split over chips."""
        if self.pieces[0].dim() == 4:
            return tensor
        return tensor.unflatten(-1, (self.pieces[0].shape[0], -1)).transpose(0, 1)

    def _vector_sums(self, parts: Sequence[torch.Tensor], pieces: Sequence[_Piece]) -> torch.Tensor:
        sums = []
        for row in range(parts[0].shape[-2]):
            products = [
                self._sum_of_products(part.select(-2, row).float(), piece)
                for part, piece in zip(parts, pieces, strict=True)
            ]
            sums.append(sum(products[1:], products[0]))
        return torch.stack(sums, dim=-2)

    def _sum_of_products(self, row: torch.Tensor, piece: _Piece) -> torch.Tensor:
        """The products [..., out] of a row [..., inputs] with a piece."""
        shape = piece.values.shape[-3:]
        ones = self.ones[: shape.numel()].view(shape)
        halves = self._halves(row, shape)  # [..., 1, chunks, groups, lanes]
        products = [
            value * (half * unit / ones)
            for value, half, unit in zip(self._raw(piece.values), halves, self._units(), strict=True)
        ]
        terms = sum(products[1:], products[0])  # [..., out, chunks, groups, lanes]
        if self.halves == 2:
            terms = terms - halves[0] * OFFSET / ones
        if piece.zero_points is not None:
            terms = terms - piece.zero_points * (sum(halves[1:], halves[0]) / ones)
        if piece.scale is not None:
            terms = terms * piece.scale
        if shape[1] > 1:
            terms = terms.sum(-2, keepdim=True) * ones[:, :1]
        return terms.sum((-3, -2, -1))

    def _matrix_products(self, parts: Sequence[torch.Tensor], pieces: Sequence[_Piece]) -> torch.Tensor:
        inputs = [self._halves(part, piece.values.shape[-3:]) for part, piece in zip(parts, pieces, strict=True)]
        inputs = [[half.flatten(-4) for half in halves] for halves in inputs]  # [..., R, inputs]
        out = pieces[0].values.shape[-4]
        width = max(piece.values.shape[-3:].numel() for piece in pieces)
        are_large = out * width >= 2 * _BLOCK and self.operations.chips == 1
        outputs = max(1, _BLOCK // width) if are_large else out
        weight_left = parts[0].shape[-2] <= LEFT_ROWS
        sums = []
        for some in zip(*(piece.split(outputs) for piece in pieces), strict=True):  # some outputs of every piece
            products = [
                self.operations.product(weight, half) if weight_left else self.operations.product(half, weight)
                for halves, piece in zip(inputs, some, strict=True)
                for half, weight in zip(halves, self._weights(piece, parts[0].dtype), strict=True)
            ]
            sums.append(sum(products[1:], products[0]))
        return torch.cat(sums, dim=-2).mT if weight_left else torch.cat(sums, dim=-1)

    def _weights(self, piece: _Piece, dtype: torch.dtype) -> list[torch.Tensor]:
        """A piece's weights [..., out, inputs] in either half of the bytes."""
        raw = self._raw(piece.values)
        weights = [half if unit == 1 else half * unit for half, unit in zip(raw, self._units(), strict=True)]
        if self.halves == 2:
            weights[0] = weights[0] - OFFSET
        if piece.zero_points is not None:
            weights = [half - piece.zero_points for half in weights]
        if piece.scale is not None:
            weights = [half * piece.scale for half in weights]
        is_exact = piece.scale is None and dtype == torch.bfloat16
        return [(self.operations.to_bfloat16(half) if is_exact else half.to(dtype)).flatten(-3) for half in weights]

    def _halves(self, rows: torch.Tensor, shape: torch.Size) -> list[torch.Tensor]:
        """The inputs [..., 1, chunks, groups, lanes] of either half of a piece's bytes, of rows [..., inputs]."""
        chunks, groups, lanes = shape
        return list(rows.unflatten(-1, (1, chunks, groups, self.halves, lanes)).unbind(-2))

    def _raw(self, held: torch.Tensor) -> list[torch.Tensor]:
        """What either half of the bytes is read as, in float32: values, with OFFSET in low halves, per ``_units``."""
        if self.kind is Values.FP8:
            return [self.operations.floats_of_half_bits((held.to(torch.int16) * 128) & _FP8_MASK)]
        return [held.float()] if self.halves == 1 else [(held & LOW).float(), (held & HIGH).float()]

    def _units(self) -> list[float]:
        if self.kind is Values.FP8:
            return [_FP8_UNIT]
        return [1, _HIGH_UNIT][: self.halves]
