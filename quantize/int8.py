"""Symmetric int8 quantization of a linear's weight, one scale per output channel: pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch

QMAX = 127


class Quantized(NamedTuple):
    """``values`` int8 [out, in] and ``scale`` float32 [out, 1]; the weight is about values * scale."""

    values: torch.Tensor
    scale: torch.Tensor


class RowError(NamedTuple):
    """What quantization cost in some rows: sums over their elements, for the report."""

    squared_error: float
    squared_weight: float
    max_error: float


def quantize_rows(weight: torch.Tensor) -> Quantized:
    """Quantize whole rows [out, in] of a floating weight to int8 in [-127, 127].

    The scale of a row is its largest magnitude / 127, as in the per-channel symmetric scheme of compressed-tensors
    ("int-quantized", channel); a row of zeros (or too small for that division) has scale 1. Rows are independent, so
    a weight may be quantized in any blocks of rows; it must not be split along ``in`` before. Values must be finite.
    """
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / QMAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Quantized((wide / scale).round_().clamp_(-QMAX, QMAX).to(torch.int8), scale)


def dequantize(quantized: Quantized) -> torch.Tensor:
    """float32 [out, in]: values * scale."""
    return quantized.values.float() * quantized.scale


def row_error(weight: torch.Tensor, quantized: Quantized) -> RowError:
    """Compare rows [out, in] with what their int8 form stands for."""
    wide = weight.float()
    difference = dequantize(quantized) - wide
    return RowError(
        squared_error=difference.square().sum(dtype=torch.float64).item(),
        squared_weight=wide.square().sum(dtype=torch.float64).item(),
        max_error=difference.abs().max().item(),
    )
