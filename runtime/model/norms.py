"""Normalizations of the sum that runs through the layers."""

from __future__ import annotations

import torch
from torch import nn

from converters.model.architecture import Norm
from converters.model.config import ModelConfig
from runtime.model.weights import Weights


def make_norm(weights: Weights, name: str, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The normalization ``name`` of the model, given out in ``dtype``."""
    if config.architecture.norm is Norm.RMS:
        return RMSNorm(weights.take(f"{name}.weight"), config.norm_eps, dtype)
    learned = ("weight", "bias") if config.architecture.norm_weights else ()
    return LayerNorm(config.norm_eps, dtype, *(weights.take(f"{name}.{part}") for part in learned))


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang & Sennrich 2019) of float32 [..., E], given out in ``dtype``."""

    def __init__(self, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.dtype = eps, dtype
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.weight.float()).to(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016) of float32 [..., E], given out in ``dtype``; weight and bias may be none."""

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
