"""Linears that XLA:CPU runs at memory speed: the weight is cut into tiles along its inputs.

A single row is a vector. XLA:CPU has a fast loop for a matrix times a vector: it reads int8, converts on the way, and
goes over [out, in] in the order of the files. XLA uses that loop only where the product's result is a vector, the input
vector has less than 16 KB, and the product isn't added to something directly (XLA would then call a library routine,
which needs the weight converted in memory at every step). So

- weights are cut along ``in`` when they are loaded, into separate tensors: slices taken in the graph run at a third of
  the speed. The compiler fully unrolls a loop over 512 inputs, which makes it half as fast again as a longer one;
- a few rows become as many products, one after the other while the tile is in the cache;
- every product is multiplied by its scale before the sum; a weight without a scale is given ones;
- the vector is divided by ones that the compiler can't know to be ones: it would move a cheap computation of the vector
  into the loop and repeat it for every output, but it considers a division too expensive to repeat. The divisor is a
  whole vector: with a single one, the division would be done in whatever shape the input had before it became a row,
  and the loop would compute indices into that shape for every input.

More rows use a matrix product on each tile, which is converted to the activations' dtype some outputs at a time, so
that the product finds them in the cache. The processor multiplies bfloat16 by itself where the product asks for its
sums in float32. Up to a few dozen rows XLA's library is faster with the weight as the left operand, then as the right.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from runtime.model.linears.linear import LinearWeight, Operations

TILE = 512  # inputs of a tile, approximately
VECTOR_ROWS = 4  # the most rows multiplied as vectors
LEFT_ROWS = 32  # the most rows of a product whose left operand is the weight
_BLOCK = 1 << 20  # elements that are converted at once of a tile which has at least twice as many
_VECTOR_INPUTS = 4095  # the most float32 inputs for which XLA:CPU uses the loop
_EXACT_IN_BFLOAT16 = (torch.int8, torch.bfloat16)  # others, float16 too, are multiplied in float32
_ALIGNMENT = 64  # bytes; XLA copies what is less aligned
_LANES = 16  # tiles start at a multiple of a vector register's float32 lanes


@dataclass(frozen=True)
class Tiles:
    """A weight cut along its inputs: tiles [out, width], or [chips, out, width] if its inputs are split over chips."""

    pieces: list[torch.Tensor]

    @property
    def inputs(self) -> int:
        """The number of inputs; per chip where they are split over chips."""
        return sum(piece.shape[-1] for piece in self.pieces)


def cut(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A weight [out, in] as views [out, width] of about ``TILE`` inputs, all of one width except the last."""
    inputs = weight.shape[1]
    count = max(1, round(inputs / TILE))
    width = -(-inputs // (count * _LANES)) * _LANES
    return weight.split(width, dim=1)


def copy_tiles(blocks: Iterable[torch.Tensor], out: int) -> list[torch.Tensor]:
    """The tiles of a weight [out, in] that comes as ``blocks`` of its rows, so that no two of it are in memory."""
    tiles: list[torch.Tensor] = []
    begin = 0
    for block in blocks:
        pieces = cut(block)
        tiles = tiles or empty_in_huge_pages([(out, piece.shape[1]) for piece in pieces], block.dtype)
        for tile, piece in zip(tiles, pieces, strict=True):
            tile[begin : begin + len(piece)] = piece
        begin += len(block)
    return tiles


def empty_in_huge_pages(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors in one anonymous mapping, which lives as long as any of them. In huge pages, where Linux has them to
    give, a step of the 7B shape takes 0.85 to 0.95 of its time.
    """
    counts = [math.prod(shape) for shape in shapes]
    sizes = [-(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for count in counts]
    memory = mmap.mmap(-1, max(1, sum(sizes)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    begins = [sum(sizes[:place]) for place in range(len(sizes))]
    return [
        torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(*shape)
        for shape, count, begin in zip(shapes, counts, begins, strict=True)
    ]


def inputs_of(weight: LinearWeight) -> int:
    """The number of a weight's inputs; per chip where they are split over chips."""
    values = weight.tensors[""]
    return values.inputs if isinstance(values, Tiles) else values.shape[1]


class TiledLinear(nn.Module):
    """y = x W^T, without a bias, for x [..., in] and a weight in tiles; summed in float32, returned in x's dtype."""

    def __init__(self, weight: LinearWeight, operations: Operations) -> None:
        """A weight's scale is float32 [out].

        A weight [out, in] that isn't in tiles, such as an embedding that is also the output head, is read as it is.
        """
        super().__init__()
        values = weight.tensors[""]
        parts = values.pieces if isinstance(values, Tiles) else [values]
        self.tiles = nn.ParameterList(nn.Parameter(part, requires_grad=False) for part in parts)
        self.operations = operations
        self.register_buffer("scale", weight.scale)
        self.register_buffer("ones", operations.ones(inputs_of(weight)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        tiles = self._tiles()
        split = tiles[0].dim() == 3
        if split:
            rows = rows.unflatten(-1, (tiles[0].shape[0], -1)).transpose(0, 1)  # [chips, R, in / chips]
        widths = [tile.shape[-1] for tile in tiles]
        multiply = self._vector_products if rows.shape[-2] <= VECTOR_ROWS else self._matrix_product
        y = multiply(tiles, rows, widths)  # float32 [R, out] or [chips, R, out]
        if split:
            y = y.sum(0)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _tiles(self) -> Sequence[torch.Tensor]:
        if len(self.tiles) > 1 or self.tiles[0].shape[-1] <= _VECTOR_INPUTS:
            return list(self.tiles)
        return cut(self.tiles[0])

    def _vector_products(
        self, tiles: Sequence[torch.Tensor], rows: torch.Tensor, widths: Sequence[int]
    ) -> torch.Tensor:
        inputs = (rows.float() / self.ones).split(widths, dim=-1)
        scale = self.ones[:1] if self.scale is None else self.scale
        sums = []
        for row in range(rows.shape[-2]):
            products = [times_vector(tile, part[..., row, :]) * scale for tile, part in zip(tiles, inputs, strict=True)]
            sums.append(sum(products[1:], products[0]))
        return torch.stack(sums, dim=-2)

    def _matrix_product(self, tiles: Sequence[torch.Tensor], rows: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        inputs = rows.split(widths, dim=-1)
        if rows.dtype == torch.bfloat16 and tiles[0].dtype in _EXACT_IN_BFLOAT16:
            convert = self.operations.to_bfloat16
        else:
            inputs, convert = [part.float() for part in inputs], torch.Tensor.float
        weight_left = rows.shape[-2] <= LEFT_ROWS

        def product(part: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
            pair = (convert(block), part) if weight_left else (part, convert(block))
            return self.operations.product(*pair)

        sums = []
        for blocks in zip(*self._blocks(tiles), strict=True):  # some outputs of every tile
            products = [product(part, block) for part, block in zip(inputs, blocks, strict=True)]
            sums.append(sum(products[1:], products[0]))
        y = torch.cat(sums, dim=-2 if weight_left else -1)
        if weight_left:
            y = y.mT
        return y if self.scale is None else y * self.scale

    def _blocks(self, tiles: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
        """The tiles, each cut along its outputs unless these may be split over chips."""
        out, width = tiles[0].shape[-2:]
        are_large = out * width >= 2 * _BLOCK and self.operations.chips == 1
        return [tile.split(max(1, _BLOCK // width) if are_large else out, dim=-2) for tile in tiles]


def times_vector(tile: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The product [..., out] of a tile [..., out, width] and x [..., width]."""
    return (tile.float() @ x.unsqueeze(-1)).squeeze(-1)
