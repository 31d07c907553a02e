"""Linears in the form that XLA:CPU runs at memory speed: the weight in tiles along its inputs, a vector for each row.

XLA:CPU has a fast loop for a matrix times a vector: it converts the weight on the way, int8 is what is read, and it
goes over [out, in] as the files have it. It takes that loop only where the product's result is a vector, where the
vector that goes in has less than 16 KB, and where the product isn't added to something at once (it would become a
routine's, which wants the weight transposed and converted: at every step, in memory). So

- weights are cut along ``in`` as they are loaded, into tiles of their own: slices taken in the graph run at a third
  of the speed, and the compiler unrolls a loop over 512 inputs whole, which runs half as fast again as a longer one;
- a few rows are as many products, one after the other while the tile is in the cache;
- every product is multiplied by its scale before the sum; a weight without a scale has ones for it;
- the vector is divided by ones, which the compiler can't know to be ones: a cheap computation that ends in the vector
  would be put into the loop and done anew for every output, a division is thought too dear for that. It is a vector of
  ones, for by a single one the division would be done in whatever shape the input had before it became a row, and the
  loop would find its way about that shape for every input.

More rows than a few are a matrix product on each tile converted once, or on the whole of a small weight; the whole of
a large one takes four times as long. The weight stands left there: at the right, XLA would have it transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from runtime.model.linears.linear import LinearWeight

TILE = 512  # inputs, about
VECTOR_ROWS = 8  # at most; each is a kernel to compile
_SMALL = 1 << 22  # elements of a weight that is put together for a matrix product
_VECTOR_INPUTS = 4095  # of float32: what XLA:CPU still takes into the loop
_LANES = 16  # a tile begins where a vector register of float32 does


@dataclass(frozen=True)
class Tiles:
    """A weight cut along its inputs: tiles [out, width], or [chips, out, width] where chips hold its inputs apart."""

    parts: list[torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def inputs(self) -> int:
        """Of each chip, where chips hold them apart."""
        return sum(part.shape[-1] for part in self.parts)


def cut(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A weight [out, in] as views [out, width] of about ``TILE`` inputs, all of one width but for the last."""
    inputs = weight.shape[1]
    count = max(1, round(inputs / TILE))
    width = -(-inputs // (count * _LANES)) * _LANES
    return weight.split(width, dim=1)


def inputs_of(weight: LinearWeight) -> int:
    """The inputs of a weight, of each chip where chips hold them apart."""
    values = weight.tensors[""]
    return values.inputs if isinstance(values, Tiles) else values.shape[1]


class TiledLinear(nn.Module):
    """y = x W^T for a weight in tiles and x [..., in], without a bias; computed in float32, given in x's dtype."""

    def __init__(self, weight: LinearWeight, ones: torch.Tensor) -> None:
        """``ones`` is float32 [in], ones on the device (``in`` of one chip, of several); a scale is float32 [out].

        A weight [out, in] that isn't in tiles, as an embedding that is the output head too, is read as it is.
        """
        super().__init__()
        values = weight.tensors[""]
        parts = values.parts if isinstance(values, Tiles) else [values]
        self.tiles = nn.ParameterList(nn.Parameter(part, requires_grad=False) for part in parts)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("ones", ones)
        self._is_small = sum(part.numel() for part in parts) < _SMALL

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()  # [R, in]
        tiles = self._tiles()
        split = tiles[0].dim() == 3
        if split:
            rows = rows.unflatten(-1, (tiles[0].shape[0], -1))  # [R, chips, in / chips]
        rows = rows / self.ones
        few = len(rows) <= VECTOR_ROWS
        if not few and self._is_small:
            tiles = [torch.cat([tile.float() for tile in tiles], dim=-1)]
        inputs = rows.split([tile.shape[-1] for tile in tiles], dim=-1)
        multiply = _vector_products if few else _matrix_product
        y = multiply(tiles, inputs, self.ones[:1] if self.scale is None else self.scale)  # [R, out] or [R, chips, out]
        if split:
            y = y.sum(1)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _tiles(self) -> Sequence[torch.Tensor]:
        if len(self.tiles) > 1 or self.tiles[0].shape[-1] <= _VECTOR_INPUTS:
            return list(self.tiles)
        return cut(self.tiles[0])


def _vector_products(
    tiles: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], scale: torch.Tensor
) -> torch.Tensor:
    sums = []
    for row in range(len(inputs[0])):
        products = [times_vector(tile, part[row]) * scale for tile, part in zip(tiles, inputs, strict=True)]
        sums.append(sum(products[1:], products[0]))
    return torch.stack(sums)


def times_vector(tile: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[..., out] of a tile [..., out, width] and x [..., width]."""
    return (tile.float() @ x.unsqueeze(-1)).squeeze(-1)


def _matrix_product(tiles: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
    products = [tile.float() @ part.movedim(0, -1) for tile, part in zip(tiles, inputs, strict=True)]
    return sum(products[1:], products[0]).movedim(-1, 0) * scale
