"""Normalizations of the residual stream: a module for each kind.

Each is given its kind's learned tensors by name, or none where the architecture's norms have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from converters.model.architecture import Norm
from converters.model.config import ModelConfig
from runtime.model.weights import Weights


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang & Sennrich 2019) of float32 [..., E]; the result is in ``dtype``."""

    def __init__(self, eps: float, dtype: torch.dtype, weight: torch.Tensor | None = None) -> None:
        super().__init__()
        self.eps, self.dtype = eps, dtype
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            x = x * self.weight.float()
        return x.to(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016) of float32 [..., E]; the result is in ``dtype``."""

    def __init__(
        self, eps: float, dtype: torch.dtype, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.eps, self.dtype = eps, dtype
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            x = x * self.weight.float() + self.bias.float()
        return x.to(self.dtype)


NORM_KINDS: dict[Norm, Callable[..., nn.Module]] = {Norm.RMS: RMSNorm, Norm.LAYER: LayerNorm}


def make_norm(weights: Weights, name: str, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The model's normalization ``name``, with results in ``dtype``. Raises MissingTensor where a tensor is absent."""
    architecture = config.architecture
    learned = architecture.norm.value if architecture.norm_weights else ()
    tensors: Mapping[str, torch.Tensor] = {tensor: weights.take(f"{name}.{tensor}") for tensor, _ in learned}
    return NORM_KINDS[architecture.norm](config.norm_eps, dtype, **tensors)
