"""Symmetric int8 quantization of a linear's weight, one scale per output channel: pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch

from converters.source import CACHED_ELEMENTS, row_blocks

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
    parts = []
    for start, stop in row_blocks(0, rows, width, CACHED_ELEMENTS):
        wide = weight[start:stop].float()
        scale = wide.abs().amax(dim=1, keepdim=True) / QMAX
        scale = torch.where(scale < _SMALLEST_SCALE, torch.ones_like(scale), scale)
        steps = wide / scale
        whole = steps.round()
        values[start:stop] = whole
        parts.append((scale, *_measure(steps, whole, scale)))
    scale, *errors = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Quantized(values, scale), RowErrors(*errors)


def dequantize(quantized: Quantized) -> torch.Tensor:
    """float32 [out, in]: values * scale."""
    return quantized.values.float() * quantized.scale


def _measure(steps: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> RowErrors:
    """Compare rows [out, in], given in units of their scale [out, 1], with the whole numbers they became."""
    difference = values - steps
    unit = scale.squeeze(1).double()
    return RowErrors(
        squared_error=(difference * difference).sum(1).double() * unit.square(),
        squared_weight=(steps * steps).sum(1).double() * unit.square(),
        max_error=difference.abs_().amax(1).double() * unit,
    )
