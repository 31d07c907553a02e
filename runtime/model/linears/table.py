"""The one table that gives the linear for a weight format and a device."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from torch import nn

from quantize.formats.floating import Floating
from quantize.formats.weight_format import WeightFormat
from runtime.model.linears.grouped import GroupedLinear
from runtime.model.linears.layouts import Layout
from runtime.model.linears.linear import DecodedLinear, Linear, LinearWeight, Operations
from runtime.model.linears.packed import PackedLinear
from runtime.model.linears.tiled import TiledLinear


class Device(Enum):
    """Kinds of devices that have their own linears."""

    ANY = auto()  # eager execution, and CUDA: weights as they are
    MATRIX_UNIT = auto()  # TPUs and GPUs under XLA
    XLA_CPU = auto()
    INDUCTOR_CPU = auto()


class LinearKind(NamedTuple):
    """How a linear is made of a weight, with its device's operations, and how the device holds the weight."""

    make: Callable[[LinearWeight, Operations], nn.Module]
    layout: Layout = Layout.AS_STORED


_PLAIN = LinearKind(lambda weight, operations: Linear(weight))
_TILED = LinearKind(TiledLinear, Layout.TILES)
_PACKED = LinearKind(lambda weight, operations: PackedLinear(weight))
_DECODED = LinearKind(lambda weight, operations: DecodedLinear(weight))
_GROUPED = LinearKind(lambda weight, operations: GroupedLinear(weight), Layout.PIECES)


def linear_kind(weight_format: WeightFormat, device: Device) -> LinearKind:
    """The linear for weights of this format on this device; a format that has none of its own there is decoded."""
    if isinstance(weight_format, Floating) or weight_format.name == "int8":
        return {Device.XLA_CPU: _TILED, Device.INDUCTOR_CPU: _PACKED}.get(device, _PLAIN)
    if device is Device.MATRIX_UNIT and weight_format.kind in ("int8", "int4", "fp8"):
        return _PLAIN if weight_format.name == "fp8" else _GROUPED
    return _DECODED


def make_linear(weight: LinearWeight, device: Device = Device.ANY, operations: Operations | None = None) -> nn.Module:
    """The linear for a weight that is held as ``linear_kind`` says; ``operations`` are torch's own by default."""
    return linear_kind(weight.format, device).make(weight, operations or Operations())
