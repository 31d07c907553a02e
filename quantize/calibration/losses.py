"""What every linear's formats are expected to cost the model, in nats per token.

A weight's error dW changes its outputs at a token by d = dW x. To the second order, as if errors were independent,
the divergence KL(exact || rounded) of the model's predictions grows by half the sum over the outputs of g^2 d^2. There
g is the gradient by the output of the log-probabilities of tokens drawn from the model itself; its mean square is the
diagonal of the Fisher information. With the mean squares m of the inputs and G of the gradients a weight costs
1/2 sum_ij G_i m_j dW_ij^2: an estimate, which tells weights from each other better than it tells their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from converters.console.progress import Advance
from converters.files.parallel import in_order
from converters.files.row_blocks import CACHED_ELEMENTS, row_blocks
from converters.model.config import ModelConfig
from converters.sources.source import TensorSource
from quantize.calibration.moments import Moments
from quantize.formats.table import FORMATS
from quantize.shards.scheme import UNQUANTIZED, choices

if TYPE_CHECKING:
    import torch


def predicted_losses(
    source: TensorSource,
    config: ModelConfig,
    formats: Mapping[str, Sequence[str]],
    moments: Moments,
    gradients: Moments,
    advance: Advance,
) -> dict[str, dict[str, float]]:
    """By weight and format, nats per token. ``formats`` has the names of those that are tried for each weight.

    ``gradients`` are the mean squares of those by the outputs, [out] by weight. ``advance`` is told weights' elements.
    """
    losses = {name: dict.fromkeys(tried, 0.0) for name, tried in formats.items()}
    tasks = _tasks(source, config, formats, moments, gradients)
    for name, elements, found in in_order(tasks):
        for form, loss in found.items():
            losses[name][form] += loss
        advance(elements, name)
    return losses


Task = Callable[[], tuple[str, int, dict[str, float]]]


def _tasks(
    source: TensorSource,
    config: ModelConfig,
    formats: Mapping[str, Sequence[str]],
    moments: Moments,
    gradients: Moments,
) -> Iterator[Task]:
    shapes = choices(config)
    for name, tried in formats.items():
        for start, stop in row_blocks(0, *shapes[name].shape):
            known = moments.by_weight[name], gradients.by_weight[name][start:stop]
            yield partial(_block, source, name, start, stop, tried, *known)


def _block(
    source: TensorSource,
    name: str,
    start: int,
    stop: int,
    formats: Sequence[str],
    moments: torch.Tensor,
    gradients: torch.Tensor,
) -> tuple[str, int, dict[str, float]]:
    rows = source.rows(name, start, stop)
    found = dict.fromkeys((form for form in formats if form != UNQUANTIZED), 0.0)
    for first, last in row_blocks(0, *rows.shape, CACHED_ELEMENTS):
        weight, weights = rows[first:last], gradients[first:last].double()
        for form in found:
            encoded = FORMATS[form].encode(weight, importance=moments)
            squares = FORMATS[form].decode(encoded.tensors).sub_(weight).square_().mul_(moments)
            found[form] += 0.5 * float(weights @ squares.sum(1).double())
    return name, rows.numel(), found
