"""Attention over the cache, in the forms that devices want; the results are the same.

Shapes as in decoder.py. Each takes query heads under their KV heads [B, T, H, G, D], the cache's tensors of a layer
(keys and values [B, H, S, D]; of an int8 cache also the scales of both, [B, H, S, 1]), and a mask [B, T, S], true where
a token may look; it gives [B, T, H, G, D] in float32. Where T is S, token t stands at slot t and looks no further.
Scores and weights are float32: in bfloat16 their rounding would be the largest error of the whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from runtime.devices.cpu.tiled_linear import times_vector

_BLOCK = 128  # tokens of a first section whose scores are made at once
_MOST_VECTORS = 32  # of a layer and a chip; each is a kernel to compile

Attend = Callable[[torch.Tensor, Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


def attend(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Two matrix products with a softmax between; an int8 cache's scales go to scores and weights, S of each."""
    return _weighted(_scores(_products(q, cached[0]), cached, mask), cached)


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
    weights = _weights(_scores(products, cached, mask), cached)
    y = weights.transpose(0, 1).flatten(2, 3) @ values  # [H, B, G * T, D]
    return y.unflatten(2, (group, length)).permute(1, 3, 0, 2, 4)


def attend_by_vectors(
    q: torch.Tensor,
    cached: Sequence[torch.Tensor],
    mask: torch.Tensor,
    chips: int,
    keep: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """For one token to a row (T is 1) on XLA:CPU: a product of the keys and a vector for each query head.

    XLA:CPU converts the keys within that product's loop (tiles.py); for a matrix of vectors it writes them all anew in
    float32, transposed. Of each of the ``chips`` one head is taken at a time; ``keep`` is ``Form``'s.
    """
    rows, _, heads, group, _ = q.shape
    if rows * (heads // chips) * group > _MOST_VECTORS:
        return attend(q, cached, mask)
    vectors = keep(q.float()).unflatten(2, (chips, -1))  # [B, 1, C, H / C, G, D]
    keys = cached[0].unflatten(1, (chips, -1))  # [B, C, H / C, S, D]
    products = [
        [
            torch.stack([times_vector(keys[row, :, head], vectors[row, 0, :, head, member]) for member in range(group)])
            for head in range(heads // chips)
        ]
        for row in range(rows)
    ]
    by_chip = torch.stack([torch.stack(each) for each in products])  # [B, H / C, G, C, S]
    by_head = by_chip.permute(0, 3, 1, 2, 4).flatten(1, 2)  # [B, H, G, S]
    return _weighted(_scores(by_head.unsqueeze(3), cached, mask), cached)


def attend_by_products(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """For many tokens on XLA:CPU, which multiplies T * S weights far faster than it sums or divides them.

    The softmax's sums come out of the product, from a column of ones beside the values; T * D results are divided.
    The tokens of a first section go by blocks, each with the slots up to its end.
    """
    keys, values = _dequantized(cached)
    values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    length, slots = mask.shape[1:]
    is_first = length == slots
    block = _BLOCK if is_first else length
    parts = []
    for begin in range(0, length, block):
        tokens, seen = slice(begin, begin + block), slice(begin + block if is_first else slots)
        scores = _scores(_products(q[:, tokens], keys[:, :, seen]), [keys, values], mask[:, tokens, seen])
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        parts.append(torch.einsum("bhgts,bhsd->bthgd", weights, values[:, :, seen]))
    sums = torch.cat(parts, dim=1)
    return sums[..., :-1] / sums[..., -1:]


def attend_fused(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """For many tokens in PyTorch's own kernel, which keeps a block of scores in the processor's cache."""
    group = q.shape[3]
    keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in _dequantized(cached))
    heads = q.float().flatten(2, 3).transpose(1, 2)  # [B, H * G, T, D]
    y = nn.functional.scaled_dot_product_attention(heads, keys, values, attn_mask=mask[:, None])
    return y.transpose(1, 2).unflatten(2, (-1, group))


def _products(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Of every query with every key, [B, H, G, T, S]."""
    return torch.einsum("bthgd,bhsd->bhgts", q.float(), keys.float())


def _scores(products: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """[B, H, G, T, S], with -inf where a token may not look."""
    keys, _, *scales = cached
    scores = products * keys.shape[-1] ** -0.5
    if scales:
        scores = scores * _by_slot(scales[0])
    return scores.masked_fill(~mask[:, None, None], float("-inf"))


def _weighted(scores: torch.Tensor, cached: Sequence[torch.Tensor]) -> torch.Tensor:
    """The values' means, [B, T, H, G, D]."""
    return torch.einsum("bhgts,bhsd->bthgd", _weights(scores, cached), cached[1].float())


def _weights(scores: torch.Tensor, cached: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the values [B, H, S, D], as the cache holds them, are multiplied by: [B, H, G, T, S]."""
    _, _, *scales = cached
    weights = scores.softmax(-1)
    return weights * _by_slot(scales[1]) if scales else weights


def _by_slot(scale: torch.Tensor) -> torch.Tensor:
    """[B, H, S, 1] as [B, H, 1, 1, S]."""
    return scale.squeeze(-1)[:, :, None, None]


def _dequantized(cached: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Keys and values [B, H, S, D] in float32."""
    keys, values, *scales = cached
    if not scales:
        return [keys.float(), values.float()]
    return [keys.float() * scales[0], values.float() * scales[1]]
