"""Integers of 4 bits, eight to an int32, as the compressed-tensors layout "pack-quantized" holds them.

Element i of eight is at bit 4 * i from the lowest, with 8 added, so that -8 is 0. Where a row isn't full, the last
word's highest bits are 0. (https://github.com/vllm-project/compressed-tensors, ``compressors/pack_quantized``)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PER_WORD = 8
_OFFSET = 8


def word_count(length: int) -> int:
    """The words that hold so many integers."""
    return -(-length // PER_WORD)


def pack(values: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """int8 values [R, C] from -8 to 7 as int32 words: [R, C / 8] or, along axis 0, [R / 8, C]; rounded up."""
    import torch

    if axis == 0:
        return pack(values.T.contiguous()).T.contiguous()
    rows, length = values.shape
    nibbles = torch.zeros(rows, word_count(length) * PER_WORD, dtype=torch.int8)
    torch.add(values, _OFFSET, out=nibbles[:, :length])
    pairs = nibbles.view(torch.int16)  # one element in each byte
    return (pairs | pairs >> 4).to(torch.uint8).view(torch.int32)


def unpack(words: torch.Tensor, length: int, axis: int = 1) -> torch.Tensor:
    """``length`` int8 values along ``axis`` of what ``pack`` gave."""
    import torch

    if axis == 0:
        return unpack(words.T.contiguous(), length).T.contiguous()
    # ``contiguous`` leaves an axis of length 1 any stride, and then it can't be seen as bytes.
    words = words.clone(memory_format=torch.contiguous_format)
    pairs = words.view(torch.uint8).to(torch.int16)
    values = (pairs | pairs << 4).bitwise_and_(0x0F0F).view(torch.int8).sub_(_OFFSET)
    return values[:, :length].contiguous()
