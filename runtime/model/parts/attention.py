"""Attention over the cache, and the steps shared with the variants for other devices, which give the same results.

Shapes as in decoder.py. Each variant takes query heads grouped under their KV heads [B, T, H, G, D], one layer's cache
tensors (keys and values [B, H, S, D]; for an int8 cache also the scales of both, [B, H, S, 1]) and a mask [B, T, S],
true where a token may attend. It returns float32 [B, T, H, G, D]. Where T equals S, token t is at slot t and attends to
no later slot. Scores and weights are float32: rounding them to bfloat16 would be the largest error of the whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Attend = Callable[[torch.Tensor, Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


def attend(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Two matrix products with a softmax between; an int8 cache's scales multiply the scores and weights instead."""
    return weighted_values(attention_scores(query_key_products(q, cached[0]), cached, mask), cached)


def attend_exactly(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """``attend``, with plain matrix products in place of einsum where queries are float32.

    A TPU computes an einsum's products in bfloat16 even where exact ones are asked for (``exact`` in backend.py). Heads
    come before rows so that each chip keeps its own heads when the two axes are merged.
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
    """Scores [B, H, G, T, S] from query-key products of that shape: scaled, and -inf where a token may not attend."""
    keys, _, *scales = cached
    scores = products * keys.shape[-1] ** -0.5
    if scales:
        scores = scores * _by_slot(scales[0])
    return scores.masked_fill(~mask[:, None, None], float("-inf"))


def weighted_values(scores: torch.Tensor, cached: Sequence[torch.Tensor]) -> torch.Tensor:
    """The values averaged with the softmax of ``scores`` [B, H, G, T, S] as weights: float32 [B, T, H, G, D]."""
    return torch.einsum("bhgts,bhsd->bthgd", _weights(scores, cached), cached[1].float())


def _weights(scores: torch.Tensor, cached: Sequence[torch.Tensor]) -> torch.Tensor:
    """Factors [B, H, G, T, S] for the values as the cache stores them: the softmax, times the values' scales if any."""
    _, _, *scales = cached
    weights = scores.softmax(-1)
    return weights * _by_slot(scales[1]) if scales else weights


def _by_slot(scale: torch.Tensor) -> torch.Tensor:
    """Scales [B, H, S, 1] reshaped to [B, H, 1, 1, S]."""
    return scale.squeeze(-1)[:, :, None, None]


def dequantized_cache(cached: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The cache's keys and values [B, H, S, D] in float32."""
    keys, values, *scales = cached
    if not scales:
        return [keys.float(), values.float()]
    return [keys.float() * scales[0], values.float() * scales[1]]
