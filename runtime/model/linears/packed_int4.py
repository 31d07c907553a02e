"""Linears of 4-bit weights on a CPU by PyTorch's own kernel, which Inductor calls.

The kernel (``_weight_int4pack_mm_for_cpu``) reads two values of a byte, in an order that depends on the processor, and
sums in float32. It takes outputs by sixteens and groups of 32, 64, 128 or 256 inputs with bfloat16 or float32 scales.
A weight with one scale for each output is given groups with scales of one, and its own afterwards. The kernel's zero
points would be rounded to bfloat16, so those of a weight are taken off afterwards, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from runtime.model.linears.linear import DecodedLinear, LinearWeight
from runtime.model.linears.packed import in_memory

_GROUPS = (256, 128, 64, 32)  # inputs of a group, as the kernel takes them
_OUTPUTS = 16  # the kernel takes so many at a time
_BLOCK = 64 * 64  # outputs that are packed at once, whole blocks of the kernel's own
_OFFSET = 8


@dataclass(frozen=True)
class PackedInt4:
    """The values of a weight [out, in] as the kernel reads them, [out rounded up, in / 2]."""

    packed: torch.Tensor
    out: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


def kernel_group(inputs: int, groups: int | None) -> int | None:
    """The inputs of the kernel's groups for a weight with so many groups (None: one scale for each output).

    None where the kernel has no such groups.
    """
    sizes = [inputs // groups] if groups else [size for size in _GROUPS if inputs % size == 0]
    return sizes[0] if sizes and sizes[0] in _GROUPS else None


def pack_int4(values: torch.Tensor) -> PackedInt4:
    """Pack int8 values [out, in] from -8 to 7; a block of outputs after the other, since the kernel takes int32."""
    out = len(values)
    missing = -out % _OUTPUTS
    blocks = [block.int() + _OFFSET for block in nn.functional.pad(values, (0, 0, 0, missing)).split(_BLOCK)]
    packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(block, 1) for block in blocks]
    return PackedInt4(torch.cat(packed), out)


class PackedInt4Linear(nn.Module):
    """y = x W^T, without a bias, for x [..., in] and a weight in ``PackedInt4``."""

    def __init__(self, weight: LinearWeight) -> None:
        """Scales are bfloat16 or float16 [out, groups] or float32 [out], zero points int8 of the same shape."""
        super().__init__()
        values: PackedInt4 = weight.values
        scale, rows, inputs = weight.scale, len(values.packed), 2 * values.packed.shape[1]
        self.out, groups = values.out, scale.shape[1] if scale.dim() == 2 else None
        self.group = kernel_group(inputs, groups)
        # Scales and the kernel's zeros. bfloat16 doesn't hold scales of float16: then rows are computed in float32.
        self.dtype = torch.float32 if scale.dtype == torch.float16 else None
        by_group = torch.zeros(inputs // self.group, rows, 2, dtype=self.dtype or torch.bfloat16)
        by_group[:, : self.out, 0] = 1 if groups is None else scale.T
        self.register_buffer("packed", values.packed)
        self.register_buffer("by_group", by_group)
        self.register_buffer("weight_scale", scale if groups is None else None)
        offset = None if weight.zero_points is None else (weight.zero_points * scale.float()).view(self.out, -1).T
        self.register_buffer("offset", offset)  # float32 [groups, out]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        # Inductor gives a library's kernel only what lies in memory.
        dtype = self.dtype or rows.dtype
        inputs, by_group = in_memory(rows.to(dtype)), in_memory(self.by_group.to(dtype))
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, self.packed, self.group, by_group)[:, : self.out]
        if self.weight_scale is not None:
            y = y.float() * self.weight_scale
        if self.offset is not None:
            y = y.float() - rows.float().unflatten(-1, (len(self.offset), -1)).sum(-1) @ self.offset
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def int4_linear(weight: LinearWeight) -> nn.Module:
    """The linear for a 4-bit weight: the kernel's where the values are packed for it."""
    return PackedInt4Linear(weight) if isinstance(weight.values, PackedInt4) else DecodedLinear(weight)
