"""Integers of 4 or 8 bits in words of 32, as the compressed-tensors layout "pack-quantized" holds them.

Element i of eight is at bit 4 * i from the lowest, with 8 added, so that -8 is 0; of four, at bit 8 * i with 128 added.
Where a row isn't full, the last word's highest bits are 0.
(https://github.com/vllm-project/compressed-tensors, ``compressors/pack_quantized``)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PER_WORD = 8  # of 4 bits
_OFFSET = 8


def word_count(length: int, bits: int = 4) -> int:
    """The words that hold so many integers."""
    return -(-length * bits // 32)


def pack(values: torch.Tensor, axis: int = 1, bits: int = 4) -> torch.Tensor:
    """int8 values [R, C] as int32 words: [R, C * bits / 32] or, along axis 0, [R * bits / 32, C]; rounded up.

    Values of 4 bits are from -8 to 7.
    """
    import torch

    if axis == 0:
        return pack(values.T.contiguous(), bits=bits).T.contiguous()
    rows, length = values.shape
    elements = torch.zeros(rows, word_count(length, bits) * 32 // bits, dtype=torch.int8)
    if bits == 8:  # in two's complement 128 is added by the highest bit
        torch.bitwise_xor(values, -128, out=elements[:, :length])
        return elements.view(torch.int32)
    torch.add(values, _OFFSET, out=elements[:, :length])
    pairs = elements.view(torch.int16)  # one element in each byte
    return (pairs | pairs >> 4).to(torch.uint8).view(torch.int32)


def unpack(words: torch.Tensor, length: int, axis: int = 1) -> torch.Tensor:
    """``length`` int8 values of 4 bits along ``axis`` of what ``pack`` gave."""
    import torch

    if axis == 0:
        return unpack(words.T.contiguous(), length).T.contiguous()
    # ``contiguous`` leaves an axis of length 1 any stride, and then it can't be seen as bytes.
    words = words.clone(memory_format=torch.contiguous_format)
    pairs = words.view(torch.uint8).to(torch.int16)
    values = (pairs | pairs << 4).bitwise_and_(0x0F0F).view(torch.int8).sub_(_OFFSET)
    return values[:, :length].contiguous()
