"""Attention over the cache, and the steps that the forms for other devices share; the results are the same.

Shapes as in decoder.py. Each takes query heads under their KV heads [B, T, H, G, D], the cache's tensors of a layer
(keys and values [B, H, S, D]; of an int8 cache also the scales of both, [B, H, S, 1]), and a mask [B, T, S], true where
a token may look; it gives [B, T, H, G, D] in float32. Where T is S, token t stands at slot t and looks no further.
Scores and weights are float32: in bfloat16 their rounding would be the largest error of the whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Attend = Callable[[torch.Tensor, Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


def attend(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Two matrix products with a softmax between; an int8 cache's scales go to scores and weights, S of each."""
    return weighted_values(attention_scores(query_key_products(q, cached[0]), cached, mask), cached)


def attend_exactly(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """``attend``, but for queries of float32 by plain matrix products.

    A TPU computes an einsum's products in bfloat16, whatever it is told of exact ones (``exact`` in backend.py). Heads
    come before rows, in which order a chip's heads stay its own when the two become one axis.
    """
    if q.dtype != torch.float32:
        return attend(q, cached, mask)
    length, group = q.shape[1], q.shape[3]
    queries = q.permute(2, 0, 3, 1, 4).flatten(2, 3)  # [H, B, G * T, D]
    keys, values = (tensor.float().transpose(0, 1) for tensor in cached[:2])  # [H, B, S, D]
    products = (queries @ keys.mT).unflatten(2, (group, length)).transpose(0, 1)  # [B, H, G, T, S]
    weights = _weights(attention_scores(products, cached, mask), cached)
    y = weights.transpose(0, 1).flatten(2, 3) @ values  # [H, B, G * T, D]
    return y.unflatten(2, (group, length)).permute(1, 3, 0, 2, 4)


def query_key_products(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The products of every query [B, T, H, G, D] with every key [B, H, S, D], in float32: [B, H, G, T, S]."""
    return torch.einsum("bthgd,bhsd->bhgts", q.float(), keys.float())


def attention_scores(products: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The scores [B, H, G, T, S] of such products: scaled, and -inf where a token may not look."""
    keys, _, *scales = cached
    scores = products * keys.shape[-1] ** -0.5
    if scales:
        scores = scores * _by_slot(scales[0])
    return scores.masked_fill(~mask[:, None, None], float("-inf"))


def weighted_values(scores: torch.Tensor, cached: Sequence[torch.Tensor]) -> torch.Tensor:
    """The means of the values by the softmax of ``scores`` [B, H, G, T, S]: float32 [B, T, H, G, D]."""
    return torch.einsum("bhgts,bhsd->bthgd", _weights(scores, cached), cached[1].float())


def _weights(scores: torch.Tensor, cached: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the values [B, H, S, D], as the cache holds them, are multiplied by: [B, H, G, T, S]."""
    _, _, *scales = cached
    weights = scores.softmax(-1)
    return weights * _by_slot(scales[1]) if scales else weights


def _by_slot(scale: torch.Tensor) -> torch.Tensor:
    """[B, H, S, 1] as [B, H, 1, 1, S]."""
    return scale.squeeze(-1)[:, :, None, None]


def dequantized_cache(cached: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The cache's keys and values [B, H, S, D] in float32."""
    keys, values, *scales = cached
    if not scales:
        return [keys.float(), values.float()]
    return [keys.float() * scales[0], values.float() * scales[1]]
