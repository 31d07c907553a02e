"""Attention in every form that a device may choose, against a loop over heads and tokens in float64."""

from __future__ import annotations

import pytest
import torch

from runtime.attend import Attend, attend, attend_by_products, attend_fused
from runtime.kv_cache import quantize_tokens

ROWS, HEADS, GROUP, TOKENS, SLOTS, SIZE = 2, 3, 2, 5, 11, 4
FORMS = [attend, attend_by_products, attend_fused]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_against_a_loop(form: Attend, cache_dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    q = torch.randn(ROWS, TOKENS, HEADS, GROUP, SIZE) * 4
    keys, values = torch.randn(2, ROWS, HEADS, SLOTS, SIZE)
    cached = [keys.to(cache_dtype), values.to(cache_dtype)]
    keys, values = (tensor.double() for tensor in cached)
    if cache_dtype == torch.int8:
        (keys, key_scale), (values, value_scale) = map(quantize_tokens, torch.randn(2, ROWS, HEADS, SLOTS, SIZE))
        cached = [keys, values, key_scale, value_scale]
        keys, values = keys.double() * key_scale, values.double() * value_scale
    begin = torch.tensor([0, 3])  # of each row
    places = torch.arange(SLOTS)
    mask = (places >= begin[:, None])[:, None] & (places <= (SLOTS - TOKENS + torch.arange(TOKENS))[:, None])
    expected = torch.zeros(ROWS, TOKENS, HEADS, GROUP, SIZE, dtype=torch.float64)
    for row, token, head, member in torch.cartesian_prod(*map(torch.arange, (ROWS, TOKENS, HEADS, GROUP))).tolist():
        seen = mask[row, token].nonzero().flatten()
        odds = (keys[row, head, seen] @ q[row, token, head, member].double() / SIZE**0.5).exp()
        expected[row, token, head, member] = odds / odds.sum() @ values[row, head, seen]
    found = form(q, cached, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_scores_that_overflow_an_exponential(form: Attend) -> None:
    q = torch.tensor([1.0]).reshape(1, 1, 1, 1, 1)
    keys, values = (torch.tensor(each).reshape(1, 1, 3, 1) for each in ([1000.0, 999.0, 5000.0], [1.0, 0.0, 5.0]))
    found = form(q, [keys, values], torch.tensor([[[True, True, False]]]))
    assert found.item() == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()), rel=1e-6)
