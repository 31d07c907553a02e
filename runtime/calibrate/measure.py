"""How far a model's rounded layers take its predictions, with one layer's weights of both in memory at a time."""

from __future__ import annotations

import math

import torch

from converters.console.progress import Advance
from converters.files.parallel import every_core
from converters.model.config import ModelConfig
from converters.sources.source import TensorSource
from quantize.calibration.calibrator import Divergence
from runtime.calibrate.blocks import Blocks, StreamedLinear
from runtime.evaluate.graphs import excess


def measure_divergence(
    exact: TensorSource, rounded: TensorSource, config: ModelConfig, windows: torch.Tensor, advance: Advance
) -> Divergence:
    """Over all positions of windows of tokens [N, T]; ``advance`` is told layers."""
    with torch.no_grad(), every_core():
        models = [Blocks(source, config, windows.shape[1]) for source in (exact, rounded)]
        hidden = [model.embed(windows) for model in models]
        for number in range(config.num_layers):
            layers = [model.layer(number, StreamedLinear) for model in models]
            hidden = [
                torch.cat([layer(window) for window in x.split(1)]) for layer, x in zip(layers, hidden, strict=True)
            ]
            advance(1)
        heads, found = [model.head() for model in models], []
        for pair in zip(*hidden, strict=True):
            p, q = (
                head(x)[:, : config.vocab_size].log_softmax(-1) for head, x in zip(heads, pair, strict=True)
            )  # [T, V]
            found.append(excess(q, p).sum(-1).double())
        values = torch.cat(found)
        return Divergence(values.mean().item(), (values.std() / math.sqrt(len(values))).item())
