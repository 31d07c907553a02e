"""Rows of a weight as blocks of GGUF's types Q8_0 and Q4_0: 32 inputs with a scale in float16 in each.

From integers that fit, values and scales go into blocks as they are. Everything else is quantized as llama.cpp does it,
by the gguf library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 32
Q8_0, Q4_0 = QUANTIZED = ("Q8_0", "Q4_0")
LARGEST_HALF = 65504.0


def blocks_of_integers(type_name: str, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """uint8 [n, bytes]: integers int8 [n, in] with their scales [n, groups]; for Q4_0 from -8 to 7.

    A group's inputs are a multiple of BLOCK; its scale is rounded to float16 and repeated.
    """
    import torch

    rows, count = len(values), values.shape[1] // BLOCK
    half = scale.to(torch.float16).repeat_interleave(count // scale.shape[1], dim=1)
    integers = values.reshape(rows, count, BLOCK)
    if type_name == Q4_0:
        low, high = (integers + 8).view(torch.uint8).split(BLOCK // 2, dim=2)
        integers = low | high << 4
    return torch.cat([half.unsqueeze(2).view(torch.uint8), integers.view(torch.uint8)], dim=2).flatten(1)


def quantized_blocks(type_name: str, values: torch.Tensor) -> torch.Tensor:
    """uint8 [n, bytes]: floats [n, in] as the gguf library quantizes them, which is llama.cpp's own rounding."""
    import gguf
    import numpy as np
    import torch

    with np.errstate(all="ignore"):
        blocks = gguf.quantize(values.float().numpy(), gguf.GGMLQuantizationType[type_name])
    return torch.from_numpy(blocks)


def rounding(scale: torch.Tensor) -> tuple[int, float]:
    """How many of these scales float16 doesn't hold, and by what share of it the worst changes.

    Infinite where one is beyond float16's largest.
    """
    import torch

    exact = scale.double().abs()
    if not bool((exact <= LARGEST_HALF).all()):  # nor is NaN
        return scale.numel(), float("inf")
    change = (exact - exact.to(torch.float16).double()).abs()
    inexact = change > 0
    return int(inexact.sum()), float((change / exact)[inexact].amax()) if inexact.any() else 0.0
