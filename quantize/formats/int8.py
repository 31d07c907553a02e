"""Symmetric int8 quantization of a linear's weight, one scale per output channel: pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch

from converters.files.row_blocks import CACHED_ELEMENTS, row_blocks

QMAX = 127
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it float32 loses the precision that a division needs


class Quantized(NamedTuple):
    """``values`` int8 [out, in] and ``scale`` float32 [out, 1]; the weight is about values * scale."""

    values: torch.Tensor
    scale: torch.Tensor


class RowErrors(NamedTuple):
    """What quantization cost each row: sums over its elements and the largest difference of one; float64 [out]."""

    squared_error: torch.Tensor
    squared_weight: torch.Tensor
    max_error: torch.Tensor


def quantize_rows(weight: torch.Tensor) -> tuple[Quantized, RowErrors]:
    """Quantize whole rows [out, in] of a floating weight to int8 in [-127, 127], and measure what that costs.

    The scale of a row is its largest magnitude / 127, as in the per-channel symmetric scheme of compressed-tensors
    ("int-quantized", channel); a row of zeros (or of nothing above 1.5e-36) has scale 1. Rows are independent, so a
    weight may be quantized in any blocks of rows; it must not be split along ``in`` before. NaN or an infinity in a row
    makes its scale not finite.
    """
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
