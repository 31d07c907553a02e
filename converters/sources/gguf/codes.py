"""Integers and scales of GGUF's simplest types, as they are in a file (ggml-common.h of ggml).

A block of 32 inputs begins with its scale in float16. Then come, in Q8_0, 32 integers of a byte; in Q4_0, 16 bytes with
8 added to every integer: their lower halves are the first 16, their upper halves the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converters.sources.codes import Coded, Coding

if TYPE_CHECKING:
    import numpy as np

_BLOCK = 32
_SCALE_BYTES = 2
_KINDS = {"Q8_0": "int8", "Q4_0": "int4"}


def coding_of(type_name: str) -> Coding | str:
    """How ``codes_of`` gives weights of a type; or in words, why it doesn't."""
    if type_name in _KINDS:
        return Coding(_KINDS[type_name], _BLOCK, zero_points=False, scales="float16")
    return f"of GGUF's types only {' and '.join(_KINDS)} are integers times one scale"


def codes_of(raw: np.ndarray, type_name: str) -> Coded:
    """Rows of blocks, uint8 [n, bytes], as integers int8 [n, in] and scales float16 [n, in / 32]."""
    import torch

    block_bytes = _SCALE_BYTES + (_BLOCK if type_name == "Q8_0" else _BLOCK // 2)
    blocks = torch.from_numpy(raw.copy()).unflatten(1, (-1, block_bytes))
    scale = blocks[:, :, :_SCALE_BYTES].contiguous().view(torch.float16).squeeze(-1)
    codes = blocks[:, :, _SCALE_BYTES:]
    if type_name == "Q8_0":
        return Coded(codes.flatten(1).view(torch.int8), scale, None)
    halves = torch.cat((codes & 15, codes >> 4), dim=2)
    return Coded((halves.to(torch.int8) - 8).flatten(1), scale, None)
