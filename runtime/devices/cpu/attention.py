"""Variants of attention that XLA:CPU and PyTorch run fast on a CPU; shapes as in model/parts/attention.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from runtime.model.linears.linear import Operations
from runtime.model.parts.attention import (
    attention_scores,
    dequantized_cache,
    query_key_products,
    weighted_values,
)

_BLOCK = 128  # tokens of a first section whose scores are computed at once


def attend_one_by_products(
    q: torch.Tensor, cached: Sequence[torch.Tensor], mask: torch.Tensor, operations: Operations
) -> torch.Tensor:
    """For one token per row (T = 1) on XLA:CPU: its query heads are multiplied with the cached keys as they are, or as
    bfloat16 where they are int8, without a float32 copy of all keys.
    """
    # Keys were of the queries' dtype before they were stored, so a float32 cache under bfloat16 loses nothing here.
    keys = cached[0].float() if q.dtype == torch.float32 else operations.to_bfloat16(cached[0])
    products = operations.product(q.squeeze(1), keys).unsqueeze(3)  # [B, H, G, 1, S]
    return weighted_values(attention_scores(products, cached, mask), cached)


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
