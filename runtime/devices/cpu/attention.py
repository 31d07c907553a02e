"""Variants of attention that XLA:CPU and PyTorch run fast on a CPU; shapes as in model/parts/attention.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from runtime.model.linears.tiled import times_vector
from runtime.model.parts.attention import (
    attend,
    attention_scores,
    dequantized_cache,
    query_key_products,
    weighted_values,
)

_BLOCK = 128  # tokens of a first section whose scores are computed at once
_MOST_VECTORS = 32  # the most per layer and chip; each is a kernel to compile


def attend_by_vectors(
    q: torch.Tensor,
    cached: Sequence[torch.Tensor],
    mask: torch.Tensor,
    chips: int,
    materialize: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """For one token per row (T = 1) on XLA:CPU: the keys are multiplied by one vector for each query head.

    XLA:CPU converts the keys inside that product's loop (linears/tiled.py); for several vectors as a matrix it would
    write a transposed float32 copy of all keys. Each product takes one head of every one of the ``chips``.
    ``materialize`` is ``Form.materialize``.
    """
    rows, _, heads, group, _ = q.shape
    if rows * (heads // chips) * group > _MOST_VECTORS:
        return attend(q, cached, mask)
    vectors = materialize(q.float()).unflatten(2, (chips, -1))  # [B, 1, C, H / C, G, D]
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
    return weighted_values(attention_scores(by_head.unsqueeze(3), cached, mask), cached)


def attend_by_products(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """For many tokens on XLA:CPU, which multiplies T * S weights far faster than it sums or divides them.

    A column of ones appended to the values makes the product give the softmax's sums as well; then only T * D results
    are divided. A first section is computed in blocks of tokens, each with only the slots up to the block's end.
    """
    keys, values = dequantized_cache(cached)
    values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    length, slots = mask.shape[1:]
    is_first = length == slots
    block = _BLOCK if is_first else length
    parts = []
    for begin in range(0, length, block):
        tokens, seen = slice(begin, begin + block), slice(begin + block if is_first else slots)
        scores = attention_scores(
            query_key_products(q[:, tokens], keys[:, :, seen]), [keys, values], mask[:, tokens, seen]
        )
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        parts.append(torch.einsum("bhgts,bhsd->bthgd", weights, values[:, :, seen]))
    sums = torch.cat(parts, dim=1)
    return sums[..., :-1] / sums[..., -1:]


def attend_fused(q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """For many tokens, with PyTorch's fused kernel, which keeps a block of scores in the processor's cache."""
    group = q.shape[3]
    keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in dequantized_cache(cached))
    heads = q.float().flatten(2, 3).transpose(1, 2)  # [B, H * G, T, D]
    y = nn.functional.scaled_dot_product_attention(heads, keys, values, attn_mask=mask[:, None])
    return y.transpose(1, 2).unflatten(2, (-1, group))
