"""The one table that gives the linear for a weight format and a device."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from torch import nn

from quantize.formats.floating import Floating
from quantize.formats.weight_format import WeightFormat
from runtime.model.linears.linear import DecodedLinear, Linear, LinearWeight, Operations
from runtime.model.linears.packed import PackedLinear
from runtime.model.linears.tiled import TiledLinear


class Device(Enum):
    """Kinds of devices that have their own linears."""

    ANY = auto()  # TPUs, CUDA, eager execution: weights as they are
    XLA_CPU = auto()
    INDUCTOR_CPU = auto()


class LinearKind(NamedTuple):
    """How a linear is made of a weight, with its device's operations."""

    make: Callable[[LinearWeight, Operations], nn.Module]
    in_tiles: bool = False  # whether the weight's values are loaded as ``Tiles``


_PLAIN = LinearKind(lambda weight, operations: Linear(weight))
_TILED = LinearKind(TiledLinear, in_tiles=True)
_PACKED = LinearKind(lambda weight, operations: PackedLinear(weight))
_DECODED = LinearKind(lambda weight, operations: DecodedLinear(weight))
_LINEARS: dict[tuple[str, Device], LinearKind] = {
    ("int8", Device.ANY): _PLAIN,
    ("int8", Device.XLA_CPU): _TILED,
    ("int8", Device.INDUCTOR_CPU): _PACKED,
    ("floating", Device.ANY): _PLAIN,
    ("floating", Device.XLA_CPU): _TILED,
    ("floating", Device.INDUCTOR_CPU): _PACKED,
}


def linear_kind(weight_format: WeightFormat, device: Device) -> LinearKind:
    """The linear for weights of this format on this device; a format that has none of its own there is decoded."""
    name = "floating" if isinstance(weight_format, Floating) else weight_format.name
    return _LINEARS.get((name, device), _DECODED)


def make_linear(weight: LinearWeight) -> nn.Module:
    """The linear for a weight on a device of kind ``ANY``."""
    return linear_kind(weight.format, Device.ANY).make(weight, Operations())
