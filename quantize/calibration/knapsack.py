"""One choice for each of many things, such that all choices fit a budget and lose the least together.

The multiple-choice knapsack problem, by dynamic programming over the budget in whole steps (Dudzinski & Walukiewicz
1987); what rounding up to steps leaves of the budget is then spent where it gains the most for its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STEPS = 1 << 16


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """The number of the choice for each thing, whose ``costs`` sum up to at most ``budget``; None where none fit.

    Every thing has its own choices, each with a cost, not negative, and a loss.
    """
    least = [min(each) for each in costs]
    left = budget - sum(least)
    if left < 0:
        return None
    chosen = _by_steps(costs, losses, least, left)
    _spend(chosen, costs, losses, budget)
    return chosen


def _by_steps(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], least: Sequence[int], left: int
) -> list[int]:
    """The best choices where what each costs above the ``least`` is rounded up to a whole step of ``left``."""
    step = max(1, -(-left // _STEPS))
    room = left // step
    best = np.zeros(room + 1)  # by the steps that may be spent, the least loss of the things so far
    picked = []
    for cost, loss, base in zip(costs, losses, least, strict=True):
        steps = [-(-(each - base) // step) for each in cost]
        tried = np.full((len(cost), room + 1), np.inf)
        for row, need, lost in zip(tried, steps, loss, strict=True):
            if need <= room:
                row[need:] = best[: room + 1 - need] + lost
        picked.append((tried.argmin(0).astype(np.uint8), steps))
        best = tried.min(0)
    chosen, at = [], room
    for numbers, steps in reversed(picked):
        chosen.append(int(numbers[at]))
        at -= steps[chosen[-1]]
    return chosen[::-1]


def _spend(chosen: list[int], costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> None:
    """Change ``chosen`` while a single change fits the budget and loses less, the one first that gains most a byte."""
    left = budget - sum(cost[number] for cost, number in zip(costs, chosen, strict=True))
    while True:
        changes = [
            (
                (losses[thing][now] - losses[thing][other]) / max(1, costs[thing][other] - costs[thing][now]),
                thing,
                other,
            )
            for thing, now in enumerate(chosen)
            for other in range(len(costs[thing]))
            if costs[thing][other] - costs[thing][now] <= left and losses[thing][other] < losses[thing][now]
        ]
        if not changes:
            return
        _, thing, other = max(changes)
        left -= costs[thing][other] - costs[thing][chosen[thing]]
        chosen[thing] = other
