"""Linears of 4- and 8-bit values that XLA:CPU runs at memory speed, as one sum of products for each output.

A single row is a vector. XLA:CPU makes one loop of a sum over elementwise operations, which decodes the values in
registers and goes over them in memory order, if its options (``devices/cpu/process.py``) leave the sum to its own
emitters. What makes that loop fast, for LLaMA 7B's linears (4 bits in groups of 128 take 0.65 of the time of int8 with
a scale for each output):

- lanes of a vector register are added up once for a chunk of groups, and not for each: within a chunk XLA is kept from
  making one sum of the two (it would add lanes up within the loop, one chunk after the other) by a product with ones
  that the compiler can't know to be ones;
- 4-bit values need no shift, and the offset of those in the low halves is taken off in the vector register;
- the row is prepared before the loop, which a division by such ones ensures (see ``tiled.py``).

More rows use a matrix product for each half of the bytes, decoded to the activations' dtype some outputs at a time.
There, scales of groups are rounded into a bfloat16 weight, as everywhere in bfloat16; a scale for each output isn't.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from runtime.model.linears.codes import HIGH, LOW, OFFSET, Coded, Values
from runtime.model.linears.linear import Operations

VECTOR_ROWS = {Values.INT4: 8, Values.INT8: 4, Values.FP8: 4}  # the most rows multiplied as vectors
_BLOCK = 1 << 20  # elements that are decoded at once of a weight which has at least twice as many
_FP8_UNIT = 256  # float16 reads the bits of e4m3 as numbers that are so many times smaller
_FP8_MASK = -16512  # of int16: its sign, four bits of an exponent and three of a mantissa


class SummedLinear(nn.Module):
    """y = x W^T, without a bias, for x [..., in]; summed in float32, returned in x's dtype."""

    def __init__(
        self, weight: Coded, scale: torch.Tensor, zero_points: torch.Tensor | None, operations: Operations
    ) -> None:
        """Scales are float32 [out], or of any floating dtype [out, groups]; zero points int8 of the same shape.

        Groups are those that the weight was encoded with, of all chips together.
        """
        super().__init__()
        self.weight = nn.Parameter(weight.bytes, requires_grad=False)
        self.kind, self.halves = weight.kind, weight.halves
        self.operations = operations
        self.register_buffer("scale", scale)
        self.register_buffer("zero_points", zero_points)
        lanes = weight.bytes.shape[-3:]
        self.register_buffer("ones", operations.ones(lanes.numel()))
        self.register_buffer("lane_ones", operations.ones(lanes[0] * lanes[2]) if lanes[1] > 1 else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        split = self.weight.dim() == 5
        if split:
            rows = rows.unflatten(-1, (self.weight.shape[0], -1)).transpose(0, 1)  # [chips, R, in / chips]
        multiply = self._vector_sums if rows.shape[-2] <= VECTOR_ROWS[self.kind] else self._matrix_products
        y = multiply(rows)  # float32 [R, out] or [chips, R, out]
        if split:
            y = y.sum(0)
        if self.scale.dim() == 1:
            if self.zero_points is not None:
                y = y - x.reshape(len(y), -1).float().sum(-1, keepdim=True) * self.zero_points
            y = y * self.scale
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _vector_sums(self, rows: torch.Tensor) -> torch.Tensor:
        parts = self._parts(rows.float()) # [..., R, 1, chunks, groups, lanes]
        ones = self.ones.view(self.weight.shape[-3:])
        units = [_FP8_UNIT] if self.kind is Values.FP8 else [1, 2.0**-4]
        vectors = [part * unit / ones for part, unit in zip(parts, units, strict=False)]
        scale, zero_points = self._by_group(self.scale), self._by_group(self.zero_points)
        offset = parts[0] * OFFSET / ones if self.halves == 2 else None
        whole = sum(parts[1:], parts[0]) / ones if zero_points is not None else None
        sums = []
        for row in range(rows.shape[-2]):
            products = [value * vector.select(-5, row) for value, vector in zip(self._raw(self.weight), vectors, strict=True)]
            total = sum(products[1:], products[0])
            if offset is not None:
                total = total - offset.select(-5, row)
            if zero_points is not None:
                total = total - zero_points * whole.select(-5, row)
            sums.append(self._sum(total if scale is None else total * scale))
        return torch.stack(sums, dim=-2)

    def _sum(self, terms: torch.Tensor) -> torch.Tensor:
        """The sums [..., out] of terms [..., out, chunks, groups, lanes]."""
        if self.lane_ones is None:
            return terms.sum((-3, -2, -1))
        chunks = terms.sum(-2)  # [..., out, chunks, lanes]
        return (chunks * self.lane_ones.view(chunks.shape[-2:])).sum((-2, -1))

    def _matrix_products(self, rows: torch.Tensor) -> torch.Tensor:
        parts = [part.flatten(-4) for part in self._parts(rows)]  # [..., R, in / halves]
        sums = []
        for weight, scale, zero_points in self._blocks():
            products = []
            for part, values in zip(parts, self._decoded(weight), strict=True):
                if zero_points is not None:
                    values = values - zero_points
                if scale is not None:
                    values = values * scale
                values = values.flatten(-3)
                exact = scale is None and rows.dtype == torch.bfloat16
                converted = self.operations.to_bfloat16(values) if exact else values.to(rows.dtype)
                products.append(self.operations.product(part, converted))
            sums.append(sum(products[1:], products[0]))
        return torch.cat(sums, dim=-1)

    def _blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """The bytes, scales and zero points of some outputs, unless outputs may be split over chips; [..., n, ...]."""
        out, width = self.weight.shape[-4], self.weight.shape[-3:].numel()
        are_large = out * width >= 2 * _BLOCK and not self.operations.splits_outputs
        outputs = max(1, _BLOCK // width) if are_large else out
        held = [self.weight, self._by_group(self.scale), self._by_group(self.zero_points)]
        parts = [[None] * -(-out // outputs) if t is None else t.split(outputs, dim=-4) for t in held]
        return zip(*parts, strict=True)

    def _parts(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The inputs [..., 1, chunks, groups, lanes] of either half of the bytes, of rows [..., in]."""
        chunks, groups, lanes = self.weight.shape[-3:]
        return list(rows.unflatten(-1, (1, chunks, groups, self.halves, lanes)).unbind(-2))

    def _by_group(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """A tensor [out, groups] in float32 as [..., out, chunks, groups, 1]; None for one without groups."""
        if tensor is None or tensor.dim() == 1:
            return None
        if self.weight.dim() == 5:
            tensor = tensor.unflatten(-1, (self.weight.shape[0], -1)).transpose(0, 1)  # [chips, out, groups]
        return tensor.float().unflatten(-1, (*self.weight.shape[-3:-1], 1))

    def _raw(self, held: torch.Tensor) -> list[torch.Tensor]:
        """What the bytes' halves are read as, float32 in their shape: ``_decoded`` puts them right."""
        if self.kind is Values.FP8:
            bits = (held.to(torch.int16) * 128) & _FP8_MASK
            return [self.operations.floats_of_half_bits(bits)]
        return [held.float()] if self.halves == 1 else [(held & LOW).float(), (held & HIGH).float()]

    def _decoded(self, held: torch.Tensor) -> Sequence[torch.Tensor]:
        """The values of the bytes' halves in float32, in their shape."""
        values = self._raw(held)
        if self.kind is Values.FP8:
            return [values[0] * _FP8_UNIT]
        return values if self.halves == 1 else [values[0] - OFFSET, values[1] * 2.0**-4]
