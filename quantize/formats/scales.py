"""TEMPORARY stand-in."""

from __future__ import annotations

import torch

from quantize.formats.weight_format import RowErrors


def quantize_groups(weight, group, bits, zero_points, search):
    rows, width = weight.shape
    size = group or width
    top = 2 ** (bits - 1) - 1
    x = weight.float().unflatten(1, (-1, size))
    best = None
    for k in range(10 if search else 1):
        f = 1 - k * 0.05
        if zero_points:
            low, high = x.amin(2).clamp_max(0) * f, x.amax(2).clamp_min(0) * f
            scale = (high - low) / (2 * top + 1)
        else:
            scale = x.abs().amax(2) * f / top
        scale = scale.to(torch.bfloat16 if group else torch.float32)
        scale[scale.float() < 2.0**-126] = 1
        unit = scale.float()[:, :, None]
        zero = (
            (-top - 1 - (low[:, :, None] / unit)).round().clamp(-top - 1, top)
            if zero_points
            else torch.zeros_like(unit)
        )
        lowest = -top - 1 if zero_points or bits == 4 else -top
        q = ((x / unit).round() + zero).clamp(lowest, top)
        e = (q - zero) * unit - x
        s = e.square().sum(2)
        if best is None:
            best = [s, q, scale, zero, e]
        else:
            take = s < best[0]
            new = [s, q, scale, zero, e]
            best = [torch.where(take if a.dim() == 2 else take[:, :, None], b, a) for a, b in zip(best, new)]
    s, q, scale, zero, e = best
    errors = RowErrors(s.double().sum(1), x.double().square().sum((1, 2)), e.abs().amax((1, 2)).double())
    return q.flatten(1).to(torch.int8), scale, (zero.squeeze(2).to(torch.int8) if zero_points else None), errors
