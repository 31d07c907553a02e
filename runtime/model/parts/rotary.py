"""Rotary embeddings (Su et al. 2021): queries and keys rotated by their positions."""

from __future__ import annotations

import torch

Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin of the angles, [B, T, D] each, float32


def cos_and_sin(positions: torch.Tensor, frequencies: torch.Tensor) -> Rotary:
    """cos and sin [B, T, D] of the angles at ``positions`` [B, T], for float32 ``frequencies`` [D / 2]."""
    angles = positions.float()[:, :, None] * frequencies  # [B, T, D / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + D / 2) of x's last axis [..., D], in float32: Hugging Face's order of rows."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + rotated * sin).to(x.dtype)
