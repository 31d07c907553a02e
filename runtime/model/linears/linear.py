"""Linears that run on any device: the weight is converted where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from converters.formats.compressed_tensors import SCALE_SUFFIX
from quantize.formats.integers import ZERO_POINT_SUFFIX
from quantize.formats.weight_format import WeightFormat


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a linear on a device: its format's tensors by suffix, those with a single column as [out].

    A device may hold a tensor in another layout (``tiled.Tiles``).
    """

    format: WeightFormat
    tensors: Mapping[str, Any]
    splits_inputs: bool = False  # whether chips hold some of the inputs each, rather than some of the outputs

    @property
    def values(self) -> Any:
        """What the scales multiply, or the weight itself."""
        return self.tensors[self.format.parts[0].suffix]

    @property
    def scale(self) -> torch.Tensor | None:
        """The scale of each output channel, [out], or of each group, [out, groups]; None for a format without."""
        return self.tensors.get(SCALE_SUFFIX)

    @property
    def zero_points(self) -> torch.Tensor | None:
        """What stands for zero, in the scale's shape; None for a format without."""
        return self.tensors.get(ZERO_POINT_SUFFIX)


MakeLinear = Callable[[LinearWeight], nn.Module]


def float32_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The products of x's and y's vectors, which are their last axes and of the same dtype, summed in float32.

    x [R, in] and y [..., in] give [R, ...], x [..., in] and y [R, in] give [..., R]. With the same axes in front,
    x [..., R, in] and y [..., out, in] give [..., R, out].
    """
    x, y = x.float(), y.float()
    return x @ y.mT if x.dim() == y.dim() else torch.tensordot(x, y, dims=([-1], [-1]))


def int32_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The products of x's and y's rows, int8 [N, R, in] and [N, out, in], summed in int32: [N, R, out]."""
    if x.device.type != "cpu":
        return (x.double() @ y.double().mT).int()  # exact
    if x.shape[1] == 1:  # which Inductor's _int_mm gets wrong in torch 2.9
        return (x.int() * y.int()).sum(-1, dtype=torch.int32)[:, None]
    return torch.stack([torch._int_mm(rows, weight.mT) for rows, weight in zip(x, y, strict=True)])


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, unchanged."""
    return tensor


def floats_of_half_bits(bits: torch.Tensor) -> torch.Tensor:
    """The float16 numbers with these bits, int16, in float32."""
    return bits.view(torch.float16).float()


@dataclass(frozen=True, kw_only=True)
class Operations:
    """What a linear's form asks of its device; these are torch's own."""

    ones: Callable[[int], torch.Tensor] = torch.ones  # a vector of ones of that length, for linears to hold
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = float32_product
    integer_product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = int32_product
    # A tensor, unchanged, that the compiler computes in the shape that it has, whatever is done to it afterwards.
    kept_in_shape: Callable[[torch.Tensor], torch.Tensor] = as_it_is
    # Numbers that bfloat16 represents exactly, converted to it.
    to_bfloat16: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.bfloat16
    floats_of_half_bits: Callable[[torch.Tensor], torch.Tensor] = floats_of_half_bits
    chips: int = 1  # over which a weight's outputs, or its inputs, are split


class Linear(nn.Module):
    """y = x W^T, without a bias, for x [..., in] and values [out, in], floating or int8 with a scale [out].

    XLA fuses the conversion of the values into the product on TPU, so only int8 is read from memory.
    """

    def __init__(self, weight: LinearWeight) -> None:
        super().__init__()
        self.register_buffer("weight", weight.tensors[""])
        self.register_buffer("weight_scale", weight.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight.to(x.dtype))  # [..., out]
        if self.weight_scale is None:
            return y
        return (y * self.weight_scale).to(x.dtype)


class DecodedLinear(nn.Module):
    """y = x W^T for x [..., in] and a weight of any format, decoded and converted to x's dtype before the product."""

    def __init__(self, weight: LinearWeight) -> None:
        super().__init__()
        self._format = weight.format
        self._names = {suffix: f"weight{suffix}" for suffix in weight.tensors}
        # The device holds them as [out]; the format knows them as the shards have them, [out, 1].
        columns = {part.suffix for part in weight.format.parts if part.inputs is None}
        for suffix, name in self._names.items():
            tensor = weight.tensors[suffix]
            self.register_buffer(name, tensor[:, None] if suffix in columns else tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decoded = self._format.decode({suffix: getattr(self, name) for suffix, name in self._names.items()})
        return nn.functional.linear(x, decoded.to(x.dtype))  # [..., out]
