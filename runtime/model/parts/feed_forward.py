"""Feed-forward layers: a module for each kind, made from the architecture and the weights whose names start with
``prefix``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from converters.model.architecture import Architecture, FeedForward
from runtime.model.weights import Weights


class SwiGLU(nn.Module):
    """The gated feed-forward layer (Shazeer 2020)."""

    def __init__(self, weights: Weights, prefix: str, architecture: Architecture, chips: int) -> None:
        super().__init__()
        self.gate_up = weights.projections(prefix + architecture.feed_forward_in[0], (1, 1), chips, architecture.biases)
        self.down = weights.linear(prefix + architecture.feed_forward_out, architecture.biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x)  # [..., chips, F / chips]
        gated = (nn.functional.silu(gate) * up).flatten(-2)
        del gate, up  # of a long text they are the largest tensors of all
        return self.down(gated)


class ReLU(nn.Module):
    """The feed-forward layer of the first Transformer (Vaswani et al. 2017)."""

    def __init__(self, weights: Weights, prefix: str, architecture: Architecture, chips: int) -> None:
        super().__init__()
        self.up = weights.linear(prefix + architecture.feed_forward_in[0], architecture.biases)
        self.down = weights.linear(prefix + architecture.feed_forward_out, architecture.biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.relu(self.up(x)))


MakeFeedForward = Callable[[Weights, str, Architecture, int], nn.Module]  # the last is the number of chips
FEED_FORWARD_KINDS: Mapping[FeedForward, MakeFeedForward] = {FeedForward.SWIGLU: SwiGLU, FeedForward.RELU: ReLU}
