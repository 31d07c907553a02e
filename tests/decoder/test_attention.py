"""Attention in every form that a device may choose, against a loop over heads and tokens in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from runtime.devices.cpu import attention as forms
from runtime.devices.cpu.attention import attend_by_products, attend_fused, attend_one_by_products
from runtime.model.kv_cache import quantize_tokens
from runtime.model.linears.linear import Operations
from runtime.model.parts.attention import Attend, attend, attend_exactly

ROWS, HEADS, GROUP, TOKENS, SLOTS, SIZE = 2, 3, 2, 5, 11, 4
FORMS = [attend, attend_exactly, attend_by_products, attend_fused]
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("tokens", [TOKENS, SLOTS])
def test_against_a_loop(form: Attend, cache_dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later section, and a first one, which looks at itself alone and may go by blocks."""
    monkeypatch.setattr(forms, "_BLOCK", 4)
    _hold_against_a_loop(form, cache_dtype, tokens)


@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_one_token_against_a_loop(cache_dtype: torch.dtype) -> None:
    _hold_against_a_loop(partial(attend_one_by_products, operations=Operations()), cache_dtype, 1)


def _hold_against_a_loop(form: Attend, cache_dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(3)
    q = torch.randn(ROWS, tokens, HEADS, GROUP, SIZE) * 4
    keys, values = torch.randn(2, ROWS, HEADS, SLOTS, SIZE)
    cached = [keys.to(cache_dtype), values.to(cache_dtype)]
    keys, values = (tensor.double() for tensor in cached)
    if cache_dtype == torch.int8:
        (keys, key_scale), (values, value_scale) = map(quantize_tokens, torch.randn(2, ROWS, HEADS, SLOTS, SIZE))
        cached = [keys, values, key_scale, value_scale]
        keys, values = keys.double() * key_scale, values.double() * value_scale
    begin = torch.tensor([0, 3])  # of each row
    places, own = torch.arange(SLOTS), SLOTS - tokens + torch.arange(tokens)
    mask = ((places >= begin[:, None])[:, None] & (places <= own[:, None])) | (places == own[:, None])
    expected = torch.zeros(ROWS, tokens, HEADS, GROUP, SIZE, dtype=torch.float64)
    for row, token, head, member in torch.cartesian_prod(*map(torch.arange, (ROWS, tokens, HEADS, GROUP))).tolist():
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
