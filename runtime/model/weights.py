"""The decoder's weights by name, and the linears made of them: single, with a bias, or several that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from converters.console.errors import MissingTensor, UnexpectedTensor
from runtime.model.decoder_tensors import DecoderParameters
from runtime.model.linears.linear import LinearWeight, MakeLinear


class Weights:
    """A decoder's parameters by name, each to be taken once."""

    def __init__(self, parameters: DecoderParameters, make_linear: MakeLinear) -> None:
        self._left, self._make_linear = dict(parameters), make_linear

    def take(self, name: str) -> Any:
        """A parameter: a tensor, or the LinearWeight of a linear. Raises MissingTensor where there is none."""
        if name not in self._left:
            raise MissingTensor(f"The shards lack the tensor {name}, which the decoder needs.")
        return self._left.pop(name)

    def linear(self, name: str, bias: bool = False) -> nn.Module:
        """The linear with the weight ``name``.weight and, if ``bias``, the bias ``name``.bias.

        Raises MissingTensor where one of them is absent.
        """
        return self._made(self.take(f"{name}.weight"), self.take(f"{name}.bias") if bias else None)

    def projections(self, first: str, shares: Sequence[int], chips: int, bias: bool) -> Projections:
        """The linears that take the same input as the one called ``first``, fused or not.

        Raises MissingTensor where they are absent.
        """
        weights = self.take(f"{first}.weight")
        biases = self.take(f"{first}.bias") if bias else [None] * len(weights)
        return Projections([self._made(*each) for each in zip(weights, biases, strict=True)], shares, chips)

    def _made(self, weight: LinearWeight, bias: torch.Tensor | None) -> nn.Module:
        linear = self._make_linear(weight)
        return linear if bias is None else Biased(linear, bias)

    def check_all_taken(self) -> None:
        """Raise UnexpectedTensor where a parameter has not been taken."""
        for name in self._left:
            raise UnexpectedTensor(f"The shards hold the tensor {name}, which the decoder has no use for.")


class Biased(nn.Module):
    """Any linear, with a bias [out] added to its result: on every chip, or once to the chips' sum."""

    def __init__(self, linear: nn.Module, bias: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y + self.bias.to(y.dtype)


class Projections(nn.Module):
    """Linears that share an input: each by itself, or one linear whose weight joins theirs on every chip.

    ``shares`` are the relative sizes of their outputs. Returns a tensor [..., chips, size] for each.
    """

    def __init__(self, linears: Sequence[nn.Module], shares: Sequence[int], chips: int) -> None:
        super().__init__()
        self.linears, self.shares, self.chips = nn.ModuleList(linears), shares, chips

    def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        outputs = [linear(x).unflatten(-1, (self.chips, -1)) for linear in self.linears]
        if len(outputs) > 1:
            return outputs
        unit = outputs[0].shape[-1] // sum(self.shares)
        return outputs[0].split([unit * share for share in self.shares], dim=-1)
