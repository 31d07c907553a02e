"""GPTQ's and AWQ's tensors of a weight, written from the formats' descriptions in plain integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from quantized import Stored, grid, stand_for

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs in a word, from the lowest bits up


def in_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, length * bits / 32]: every row's integers bit after bit, the lowest first, in words of 32."""
    places = values.numpy()[:, :, None] >> np.arange(bits) & 1
    packed = np.packbits(places.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.copy().view(np.int32))


def gptq_of(
    weight: torch.Tensor,
    bits: int = 4,
    group: int = 32,
    *,
    version: int = 1,
    sym: bool = False,
    order: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Stored:
    """A weight by GPTQ's format of ``version`` 1 or 2; the inputs are in groups of so many as ``order`` has them."""
    inputs = weight.shape[1]
    size = inputs if group == -1 else group
    order = torch.arange(inputs) if order is None else order
    g_idx = torch.empty(inputs, dtype=torch.int64)
    g_idx[order] = torch.arange(inputs) // size
    ordered, scale, zeros = grid(weight[:, order], bits, size, dtype, not sym)
    values = torch.empty_like(ordered)
    values[:, order] = ordered
    tensors = {
        "qweight": in_words(values, bits).T,
        "qzeros": in_words((zeros - int(version == 1)).T.contiguous(), bits),
        "scales": scale.T,
        "g_idx": g_idx.int(),
    }
    return tensors, stand_for(values, scale, zeros, g_idx)


def awq_of(weight: torch.Tensor, group: int = 32, dtype: torch.dtype = torch.float16) -> Stored:
    """A weight by AWQ's version "gemm"."""
    inputs = weight.shape[1]
    size = inputs if group == -1 else group
    values, scale, zeros = grid(weight, 4, size, dtype, zero_points=True)
    packed = [in_words(_interleaved(each.T.contiguous()), 4) for each in (values, zeros)]
    tensors = {"qweight": packed[0], "qzeros": packed[1], "scales": scale.T}
    return tensors, stand_for(values, scale, zeros, torch.arange(inputs) // size)


def _interleaved(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)].flatten(1)


def gptq_settings(**fields: Any) -> dict[str, Any]:
    """A quantization_config as GPTQModel writes it."""
    return {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "lm_head": False,
        "checkpoint_format": "gptq", "pack_dtype": "int32", "damp_percent": 0.1, "damp_auto_increment": 0.0025,
        "static_groups": False, "true_sequential": True, "model_name_or_path": "", "model_file_base_name": "model",
        "meta": {"quantizer": ["gptqmodel:1.4.0"]},
    } | fields  # fmt: skip


def awq_settings(**fields: Any) -> dict[str, Any]:
    """A quantization_config as AutoAWQ writes it."""
    return {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": None,
    } | fields  # fmt: skip
