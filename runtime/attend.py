"""Attention over the cache, in the forms that devices want; the results are the same.

Shapes as in decoder.py. Each takes query heads under their KV heads [B, T, H, G, D], the cache's tensors of a layer
(keys and values [B, H, S, D]; of an int8 cache also the scales of both, [B, H, S, 1]), and a mask [B, T, S], true where
a token may look; it gives [B, T, H, G, D] in float32. Scores and weights are float32: in bfloat16 their rounding would
be the largest error of the whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

Attend = Callable[[torch.Tensor, Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


def attend(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Two matrix products with a softmax between; an int8 cache's scales go to scores and weights, S of each."""
    _, values, *scales = cached
    weights = _scores(q, cached, mask).softmax(-1)
    if scales:
        weights = weights * _by_slot(scales[1])
    return torch.einsum("bhgts,bhsd->bthgd", weights, values.float())


def attend_by_products(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """For many tokens on XLA:CPU, which multiplies T * S weights far faster than it sums or divides them.

    The softmax's sums come out of the product, from a column of ones beside the values; T * D results are divided.
    """
    scores = _scores(q, cached, mask)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    values = _dequantized(cached)[1]
    values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    sums = torch.einsum("bhgts,bhsd->bthgd", weights, values)
    return sums[..., :-1] / sums[..., -1:]


def attend_fused(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """For many tokens in PyTorch's own kernel, which keeps a block of scores in the processor's cache."""
    group = q.shape[3]
    keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in _dequantized(cached))
    heads = q.float().flatten(2, 3).transpose(1, 2)  # [B, H * G, T, D]
    y = nn.functional.scaled_dot_product_attention(heads, keys, values, attn_mask=mask[:, None])
    return y.transpose(1, 2).unflatten(2, (-1, group))


def _scores(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """[B, H, G, T, S], with -inf where a token may not look."""
    keys, _, *scales = cached
    scores = torch.einsum("bthgd,bhsd->bhgts", q.float(), keys.float()) * q.shape[-1] ** -0.5
    if scales:
        scores = scores * _by_slot(scales[0])
    return scores.masked_fill(~mask[:, None, None], float("-inf"))


def _by_slot(scale: torch.Tensor) -> torch.Tensor:
    """[B, H, S, 1] as [B, H, 1, 1, S]."""
    return scale.squeeze(-1)[:, :, None, None]


def _dequantized(cached: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Keys and values [B, H, S, D] in float32."""
    keys, values, *scales = cached
    if not scales:
        return [keys.float(), values.float()]
    return [keys.float() * scales[0], values.float() * scales[1]]
