"""The forms that a device may choose among give what the plain one gives."""

from __future__ import annotations

import pytest
import torch

from runtime.form import weigh, weigh_many

ROWS, HEADS, GROUP, TOKENS, SLOTS, SIZE = 2, 3, 2, 5, 11, 4


@pytest.mark.parametrize("scaled", [False, True])
def test_weighing_values_against_a_loop_in_float64(scaled: bool) -> None:
    torch.manual_seed(3)
    scores = torch.randn(ROWS, HEADS, GROUP, TOKENS, SLOTS, dtype=torch.float64) * 8
    hidden = torch.ones(TOKENS, SLOTS).triu(SLOTS - TOKENS + 1).bool()
    scores = scores.masked_fill(hidden, float("-inf"))
    values = torch.randn(ROWS, HEADS, SLOTS, SIZE, dtype=torch.float64)
    scale = torch.rand(ROWS, HEADS, 1, 1, SLOTS, dtype=torch.float64) if scaled else None
    expected = torch.zeros(ROWS, TOKENS, HEADS, GROUP, SIZE, dtype=torch.float64)
    for row, head, member, token in torch.cartesian_prod(*map(torch.arange, (ROWS, HEADS, GROUP, TOKENS))).tolist():
        seen = [slot for slot in range(SLOTS) if not hidden[token, slot]]
        odds = [scores[row, head, member, token, slot].exp() for slot in seen]
        for slot, odd in zip(seen, odds, strict=True):
            held = values[row, head, slot] * (1 if scale is None else scale[row, head, 0, 0, slot])
            expected[row, token, head, member] += odd / sum(odds) * held
    for form in (weigh, weigh_many):
        torch.testing.assert_close(form(scores, values, scale), expected)


def test_weighing_takes_scores_that_overflow_an_exponential() -> None:
    scores = torch.tensor([1000.0, 999.0, float("-inf")]).reshape(1, 1, 1, 1, 3)
    values = torch.tensor([1.0, 0.0, 5.0]).reshape(1, 1, 3, 1)
    for form in (weigh, weigh_many):
        assert form(scores, values, None).item() == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()), rel=1e-6)
