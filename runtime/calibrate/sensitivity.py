"""How much a model's predictions depend on the outputs of its linears: the Fisher information, layer by layer.

The layers run forwards and then backwards, one in memory at a time; their inputs wait on the disk. Shapes as in
``blocks.py``; V is the vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch

from converters.console.progress import Advance
from converters.files.parallel import every_core
from converters.model.config import ModelConfig
from converters.sources.source import TensorSource
from quantize.calibration.moments import Moments
from runtime.calibrate.blocks import Blocks, StreamedLinear
from runtime.calibrate.scratch import Scratch

_SEED = 0  # of the tokens that are drawn


def gather_gradients(
    source: TensorSource, config: ModelConfig, windows: torch.Tensor, scratch: Path, key: str, advance: Advance
) -> Moments:
    """By weight, the mean square over tokens of the gradient by each of its outputs, float32 [out], of the
    log-probabilities of tokens drawn from the model's own predictions. ``advance`` is told layers, each twice.

    ``windows`` are tokens [N, T]. ``scratch`` is a folder for the layers' inputs, which are removed at the end.
    """
    with every_core():
        blocks, inputs = Blocks(source, config, windows.shape[1]), Scratch(scratch, key, kept=None)
        hidden = _forwards(blocks, windows, inputs, advance)
        gradient = _of_head(blocks, hidden)
        found: dict[str, torch.Tensor] = {}
        for number in range(config.num_layers - 1, -1, -1):
            gradient = _backwards(blocks, number, inputs.load(number), gradient, found)
            advance(1)
        inputs.clear(config.num_layers)
    return Moments({name: (squares / windows.numel()).float() for name, squares in found.items()})


@torch.no_grad()
def _forwards(blocks: Blocks, windows: torch.Tensor, inputs: Scratch, advance: Advance) -> torch.Tensor:
    """The last layer's output [N, T, E]; ``inputs`` keeps every layer's input."""
    hidden = blocks.embed(windows)
    for number in range(blocks.config.num_layers):
        inputs.save(number, {"hidden": hidden})
        layer = blocks.layer(number, StreamedLinear)
        hidden = torch.cat([layer(window) for window in hidden.split(1)])
        advance(1)
    return hidden


def _of_head(blocks: Blocks, hidden: torch.Tensor) -> torch.Tensor:
    """The gradient [N, T, E] by the last layer's output, of the sum over tokens."""
    head, found = blocks.head(), []
    generator = torch.Generator().manual_seed(_SEED)
    for window in hidden:
        x = window.detach().requires_grad_()
        scores = head(x)[:, : blocks.config.vocab_size].log_softmax(-1)  # [T, V]
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        scores.gather(1, drawn).sum().backward()
        found.append(x.grad)
    return torch.stack(found)


def _backwards(
    blocks: Blocks,
    number: int,
    kept: dict[str, torch.Tensor],
    gradient: torch.Tensor,
    found: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The gradient by a layer's input, from that by its output; ``found`` sums the squares of those by its linears'."""

    def seen(name: str, by_output: torch.Tensor) -> None:
        squares = by_output.flatten(0, -2).square().sum(0).double()
        found[name] = found[name] + squares if name in found else squares

    layer = blocks.layer(number, lambda weight: StreamedLinear(weight, seen_gradient=seen))
    parts = []
    for window, by_output in zip(kept["hidden"].split(1), gradient.split(1), strict=True):
        x = window.detach().requires_grad_()
        layer(x).backward(by_output)
        parts.append(x.grad)
    return torch.cat(parts)
