"""The arithmetic of symmetric int8 with one scale per output channel, by its largest magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from converters.files.row_blocks import CACHED_ELEMENTS, row_blocks
from quantize.formats.weight_format import RowErrors

if TYPE_CHECKING:
    import torch

QMAX = 127
_SMALLEST_SCALE = 2.0**-126  # of float32's normal numbers: below it a division has too little precision


class Quantized(NamedTuple):
    """``values`` int8 [out, in] and ``scale`` float32 [out, 1]; the weight is about values * scale."""

    values: torch.Tensor
    scale: torch.Tensor


def quantize_rows(weight: torch.Tensor) -> tuple[Quantized, RowErrors]:
    """Quantize whole rows [out, in] of a floating weight to int8 in [-127, 127], and measure what that costs.

    The scale of a row is its largest magnitude / 127, as in the per-channel symmetric scheme of compressed-tensors
    ("int-quantized", channel); a row of zeros (or of nothing above 1.5e-36) has scale 1. Rows are independent, so a
    weight may be quantized in any blocks of rows; it must not be split along ``in`` before. NaN or an infinity in a row
    makes its scale not finite.
    """
    import torch

    rows, width = weight.shape
    values = torch.empty(rows, width, dtype=torch.int8)
    scales, squared_errors, squared_weights, max_errors = (torch.empty(rows, 1) for _ in range(4))
    blocks = list(row_blocks(0, rows, width, CACHED_ELEMENTS))
    # Two buffers for all blocks: fresh memory for every operation would cost more than the arithmetic.
    buffers = [torch.empty(blocks[0][1], width) for _ in range(2)]
    for start, stop in blocks:
        steps, whole = (buffer[: stop - start] for buffer in buffers)
        steps.copy_(weight[start:stop])
        scale = torch.abs(steps, out=whole).amax(dim=1, keepdim=True).div_(QMAX)
        scale[scale < _SMALLEST_SCALE] = 1.0
        torch.round(steps.div_(scale), out=whole)
        values[start:stop] = whole
        scales[start:stop] = scale
        errors = whole.sub_(steps)
        max_errors[start:stop] = torch.maximum(errors.amax(1, keepdim=True), -errors.amin(1, keepdim=True))
        squared_errors[start:stop] = errors.square_().sum(1, keepdim=True)
        squared_weights[start:stop] = steps.square_().sum(1, keepdim=True)
    unit = scales.double()
    errors = (squared_errors * unit.square(), squared_weights * unit.square(), max_errors * unit)
    return Quantized(values, scales), RowErrors(*(column.squeeze(1) for column in errors))
