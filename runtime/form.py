"""What of the decoder's computation a device wants in another shape or order; the results are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.linear import Linear, MakeLinear

# Scores [B, H, G, T, S], float32, with -inf where a token may not look, and values [B, H, S, D], float32 but for their
# scale [B, H, 1, 1, S], which those of an int8 cache have; gives the values weighted by the scores' softmax,
# [B, T, H, G, D].
Weigh = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def weigh(scores: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The softmax's weights times the values; the scale goes to the weights, S of each, not to S * D values."""
    weights = scores.softmax(-1) if scale is None else scores.softmax(-1) * scale
    return torch.einsum("bhgts,bhsd->bthgd", weights, values)


def weigh_many(scores: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """As ``weigh``, with the softmax's sums taken by the matrix product, from a column of ones beside the values.

    XLA:CPU sums T * S weights far more slowly than it multiplies them; and the division is left to T * D results.
    """
    if scale is not None:
        values = values * scale.squeeze(2).transpose(2, 3)  # [B, H, S, 1]
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    sums = torch.einsum("bhgts,bhsd->bthgd", weights, values)
    return sums[..., :-1] / sums[..., -1:]


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Form:
    """The parts that a device has its own form of; by default, those that a compiler such as the TPU's does well on."""

    make_linear: MakeLinear = Linear
    least_rows: int = 1  # that a matrix product is given, by copies
    weigh_many: Weigh = weigh  # where there is more than one token to a row
    keep: Callable[[torch.Tensor], torch.Tensor] = as_it_is  # around what all layers use and none should do anew
