"""Rounding with error feedback against the algorithm as published, in float64, one weight after the other.

Optimal Brain Quantization (Frantar & Alistarh 2022): a weight w_q is rounded, and those that are not rounded yet move
by -(w_q - quant(w_q)) / [H^-1]_qq * [H^-1]_:q, with the Hessian H of these weights alone, which is inverted anew every
time. GPTQ (Frantar et al. 2022) does so in one order for all rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_weighted_scales import candidates

from quantize.calibration import feedback
from quantize.calibration.feedback import CORRECTION, DAMPING, Feedback
from quantize.formats.integers import Integers

TIE = 2e-3  # float32 is trusted where float64 is further from a step's middle, in steps
ROWS, WIDTH, TOKENS = 20, 64, 200


def inputs(tokens: int = TOKENS, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Correlated, with a few inputs much larger than the others."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=draw) @ (
        torch.eye(width) + 0.6 * torch.randn(width, width, generator=draw) / width**0.5
    )
    mixed[:, 3::41] *= 12
    return mixed + 0.2


def weights(rows: int = ROWS, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(9)) * 0.05


def hessian(x: np.ndarray) -> np.ndarray:
    matrix = x.T @ x / len(x)
    mean = np.diag(matrix).mean()
    dead = np.diag(matrix) == 0
    matrix[dead, dead] = mean or 1.0
    return matrix + DAMPING * mean * np.eye(len(matrix))


def inverted(matrix: np.ndarray) -> np.ndarray:
    return torch.linalg.inv(torch.from_numpy(matrix)).numpy()


def check(
    form: Integers,
    x: torch.Tensor,
    exact: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every integer and every scale follows from the weights as they are in float64 when their turn comes.

    Returns the weight that was made.
    """
    weight = weights(width=x.shape[1]) if weight is None else weight
    encoded = Feedback.of(x, None if exact is None else exact.clone(), form.group_size, "w").encode(weight, form)
    values, scale, *zeros = (tensor.double().numpy() for tensor in encoded.tensors.values())
    zeros = zeros[0] if zeros else np.zeros_like(scale)
    rows, inexact = weight.double().numpy().copy(), x.double().numpy()
    matrix = hessian(inexact)
    if exact is not None:
        change = exact.double().numpy() - inexact
        rows += CORRECTION * (rows @ change.T @ inexact / len(inexact)) @ inverted(matrix)
    group = form.group_size or len(matrix)
    low, high = (-8, 7) if form.bits == 4 else (-128 if form.zero_points else -127, 127)
    squares = np.square(inexact).mean(0)
    left, ties = list(range(len(matrix))), 0
    for first in reversed(range(0, len(matrix), group)):
        at, number = slice(first, first + group), first // group
        _check_scale(rows[:, at], scale[:, number], zeros[:, number], squares[at], form)
        # The largest inputs first; of two alike the last.
        for q in sorted(range(first, first + group), key=lambda i: (squares[i], i), reverse=True):
            steps = rows[:, q] / scale[:, number]
            whole = np.clip(np.round(steps) + zeros[:, number], low, high)
            near = np.abs(steps - np.floor(steps) - 0.5) < TIE
            assert ((whole == values[:, q]) | near).all(), q
            assert (np.abs(whole - values[:, q]) <= 1).all()
            ties += np.count_nonzero(near)
            inverse = inverted(matrix[np.ix_(left, left)])[:, left.index(q)]
            # Where it is too near to tell, with what was chosen.
            error = rows[:, q] - (values[:, q] - zeros[:, number]) * scale[:, number]
            rows[:, left] -= np.outer(error / inverse[left.index(q)], inverse)
            left.remove(q)
    assert ties < 0.02 * rows.size
    _check_errors(encoded.errors, weight, form.decode(encoded.tensors), x)
    return form.decode(encoded.tensors)


def _check_scale(rows: np.ndarray, scale: np.ndarray, zeros: np.ndarray, squares: np.ndarray, form: Integers) -> None:
    """No candidate costs less, weighted with the mean squares; in 8 bits it is that of the largest magnitude."""
    each = candidates(torch.from_numpy(rows), form, torch.from_numpy(squares))
    each.check(torch.from_numpy(scale), torch.from_numpy(zeros))


def _check_errors(errors: feedback.RowErrors, weight: torch.Tensor, made: torch.Tensor, x: torch.Tensor) -> None:
    weight, made, x = weight.double(), made.double(), x.double()
    pairs = zip(
        errors,
        (
            (made - weight).square().sum(1),
            weight.square().sum(1),
            (made - weight).abs().amax(1),
            (x @ (made - weight).T).square().sum(0),
            (x @ weight.T).square().sum(0),
        ),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("corrected", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("zero_points", [False, True], ids=["", "zeros"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, None), (8, 32), (8, None)])
def test_as_published(bits: int, group: int | None, zero_points: bool, corrected: bool) -> None:
    x = inputs()
    exact = x + 0.3 * inputs(seed=1) if corrected else None
    check(Integers(bits, group, zero_points), x, exact)


@pytest.mark.parametrize("group", [64, None])
def test_wider_than_a_block(group: int | None) -> None:
    """Whole rows are rounded in blocks of 128; the last one here is narrower."""
    check(Integers(4, group), inputs(width=160 if group is None else 192))


@pytest.mark.parametrize("group", [32, None])
def test_inputs_that_are_always_zero(group: int | None) -> None:
    """They cost nothing and move nothing: their own weights are only rounded."""
    x = inputs()
    x[:, [0, 17, 33, 63]] = 0
    weight = weights()
    made = check(Integers(4, group), x, weight=weight)
    other = weight.clone()
    other[:, 17] = -other[:, 17]
    again = check(Integers(4, group), x, weight=other)
    rest = [i for i in range(WIDTH) if i != 17]
    # They may choose another scale, of their own group alone and only by ties; in 8 bits they would.
    assert torch.equal(made[:, rest][:, 32:], again[:, rest][:, 32:]) or group is None


@pytest.mark.parametrize("tokens", [1, 7])
def test_fewer_tokens_than_inputs(tokens: int) -> None:
    """A singular matrix: only the damping makes it regular."""
    x = inputs(tokens)
    made = check(Integers(4, 32), x)
    plain = Integers(4, 32).encode(weights())
    ours, theirs = ((x @ (form - weights()).T).norm() for form in (made, Integers(4, 32).decode(plain.tensors)))
    assert ours < theirs / 2


def test_inputs_that_are_alike() -> None:
    x = inputs()
    x[:, 1::2] = x[:, ::2]
    check(Integers(4, 64), x)


def test_all_inputs_zero() -> None:
    """Nothing is known: every weight is rounded to its nearest, with scales as without calibration."""
    weight = weights()
    for form in (Integers(4, 32), Integers(4, None), Integers(4, 64, True), Integers(8, 64)):
        zero = torch.zeros(5, WIDTH)
        found = Feedback.of(zero, zero.clone(), form.group_size).encode(weight, form)
        plain = form.encode(weight)
        assert all(torch.equal(found.tensors[suffix], each) for suffix, each in plain.tensors.items())


def test_more_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 finds no root with so little damping, ten times as much is tried, and so on, and said."""
    monkeypatch.setattr(feedback, "DAMPING", 1e-12)
    notes: list[str] = []
    monkeypatch.setattr(feedback, "note", notes.append)
    x = inputs(40)
    made = Integers(4, 64).decode(Feedback.of(x, None, 64, "w").encode(weights(), Integers(4, 64)).tensors)
    [line] = notes
    assert line.startswith("The inputs of w are so alike")
    assert int(line.partition("damped ")[2].split()[0]) in {10**power for power in range(1, 7)}
    plain = Integers(4, 64).decode(Integers(4, 64).encode(weights()).tensors)
    assert (x @ (made - weights()).T).norm() < 0.6 * (x @ (plain - weights()).T).norm()


def test_rows_are_independent() -> None:
    found = Feedback.of(inputs(), None, 64)
    form = Integers(4, 64)
    whole, part = found.encode(weights(), form), found.encode(weights()[7:11], form)
    assert all(torch.equal(part.tensors[suffix], tensor[7:11]) for suffix, tensor in whole.tensors.items())


def test_outputs_are_nearer() -> None:
    """Less than half of the error of rounding to nearest on inputs as correlated as these."""
    x, form = inputs(), Integers(4, 64)
    plain = form.decode(form.encode(weights()).tensors)
    made = form.decode(Feedback.of(x, None, 64).encode(weights(), form).tensors)
    assert (x @ (made - weights()).T).norm() < 0.6 * (x @ (plain - weights()).T).norm()


def test_the_correction_brings_the_outputs_nearer_to_the_exact_ones() -> None:
    x = inputs()
    exact, form = x + 0.3 * inputs(seed=1), Integers(8, 32)
    with_it, without = (
        form.decode(Feedback.of(x, other, 32).encode(weights(), form).tensors) for other in (exact, None)
    )
    wanted = exact @ weights().T
    assert (x @ with_it.T - wanted).norm() < (x @ without.T - wanted).norm()


def test_not_finite() -> None:
    """NaN among the weights shows in a scale, and so is refused when it is stored."""
    weight = weights()
    weight[3, 40] = float("nan")
    found = Feedback.of(inputs(), None, 32).encode(weight, Integers(4, 32))
    assert not found.tensors["_scale"][3].isfinite().all()


@pytest.mark.parametrize("width", [64, 160])
def test_the_matrix_in_blocks(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps that don't divide it, too."""
    monkeypatch.setattr(feedback, "_STEP", 48)
    check(Integers(4, 32), inputs(width=width))
    matrix = Feedback.of(inputs(width=width)).inverse
    assert torch.equal(matrix, matrix.tril())
