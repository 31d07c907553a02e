"""Every token but the first of each window is predicted once, from all those before it in its window."""

from __future__ import annotations

import pytest
import torch

from runtime.evaluate.windows import count_pieces, piece_size, pieces, predictions, warm_up_pieces, windows


@pytest.mark.parametrize("window", [2, 3, 10, 511, 512, 513, 1025, 1200])
@pytest.mark.parametrize("count", [2, 3, 9, 10, 11, 512, 513, 514, 2600])
def test_every_token_is_predicted_once(count: int, window: int) -> None:
    tokens = list(range(1000, 1000 + count))
    size = piece_size(window)
    assert [token for each in windows(tokens, window) for token in each] == tokens
    found = list(pieces(tokens, window))
    predicted = []
    for piece in found:
        assert piece.tokens.shape == piece.following.shape == (1, size)
        assert int(piece.slots[-1]) < window
        inputs, following = (each[0, : piece.length].tolist() for each in (piece.tokens, piece.following))
        first = inputs[0] - 1000
        assert piece.start == first % window
        assert inputs + following[-1:] == tokens[first : first + piece.length + 1]
        assert inputs[1:] == following[:-1]
        predicted += following
    assert predicted == [token for place, token in enumerate(tokens) if place % window]
    assert len(predicted) == predictions(count, window)
    assert len(found) == count_pieces(count, window)
    assert {piece.start > 0 for piece in found} <= {piece.start > 0 for piece in warm_up_pieces(window)}


def test_a_last_window_of_one_token_predicts_nothing() -> None:
    found = list(pieces([5, 6, 7], 2))
    assert len(found) == 1
    assert torch.equal(found[0].tokens, torch.tensor([[5, 0]]))
    assert torch.equal(found[0].following, torch.tensor([[6, 0]]))
