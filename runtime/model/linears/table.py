"""The one table that gives the linear for a weight format and a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import NamedTuple

from torch import nn

from converters.console.errors import InputError
from converters.console.notes import note
from quantize.formats.floating import Floating
from quantize.formats.table import format_title
from quantize.formats.weight_format import WeightFormat
from runtime.model.linears.codes import Values
from runtime.model.linears.grouped import GroupedLinear
from runtime.model.linears.int8_activations import Int8ActivationsLinear
from runtime.model.linears.linear import DecodedLinear, Linear, LinearWeight, Operations
from runtime.model.linears.packed import PackedLinear
from runtime.model.linears.packed8 import Packed8Linear
from runtime.model.linears.packed_int4 import int4_linear
from runtime.model.linears.summed import SummedLinear
from runtime.model.linears.tiled import TiledLinear


class Device(Enum):
    """Kinds of devices that have their own linears."""

    ANY = auto()  # eager execution, and CUDA: weights as they are
    MATRIX_UNIT = auto()  # TPUs and GPUs under XLA
    XLA_CPU = auto()
    INDUCTOR_CPU = auto()


class Layout(Enum):
    """How a device holds the tensors of a weight [out, in]."""

    AS_STORED = auto()
    TILES = auto()  # the values as in tiled.py
    CODED = auto()  # the values as in codes.py
    PACKED_INT4 = auto()  # the values as in packed_int4.py, where its kernel takes them
    PIECES = auto()  # the values as in grouped.py, scales and zero points [groups, out], or [out]


class LinearKind(NamedTuple):
    """How a linear is made of a weight, with its device's operations, and how the device holds the weight."""

    make: Callable[[LinearWeight, Operations], nn.Module]
    layout: Layout = Layout.AS_STORED


_PLAIN = LinearKind(lambda weight, operations: Linear(weight))
_TILED = LinearKind(TiledLinear, Layout.TILES)
_SUMMED = LinearKind(SummedLinear, Layout.CODED)
_PACKED = LinearKind(lambda weight, operations: PackedLinear(weight))
_PACKED8 = LinearKind(lambda weight, operations: Packed8Linear(weight))
_PACKED_INT4 = LinearKind(lambda weight, operations: int4_linear(weight), Layout.PACKED_INT4)
_DECODED = LinearKind(lambda weight, operations: DecodedLinear(weight))
_INTEGERS = LinearKind(Int8ActivationsLinear)
_GROUPED = LinearKind(GroupedLinear, Layout.PIECES)


_VALUES = {"int8": Values.INT8, "int4": Values.INT4, "fp8": Values.FP8}  # by the kind of a format


def takes_int8_activations(weight_format: WeightFormat) -> bool:
    """Whether activations can be rounded to int8 for it: integers with one scale for each output."""
    return weight_format.name in ("int8", "int4")


def check_activations(activations: str, formats: Sequence[WeightFormat]) -> None:
    """Raise InputError where ``activations``, one of ACTIVATIONS, are int8 and the weights, in these ``formats``, don't
    allow it. Note those that don't where others do.
    """
    if activations != "int8":
        return
    others = ", ".join(format_title(each) for each in formats if not takes_int8_activations(each))
    if not any(takes_int8_activations(each) for each in formats):
        raise InputError(
            "Activations in int8 are for int8 and int4 weights with one scale for each output, and these are "
            f"{others}. Leave --activations out, or quantize with --group-size channel."
        )
    if others:
        note(f"Activations are not rounded to int8 before weights in {others}.")


def values_kind(weight_format: WeightFormat) -> Values:
    """What a quantized weight's values are."""
    return _VALUES[weight_format.kind]


def linear_kind(weight_format: WeightFormat, device: Device, int8_activations: bool = False) -> LinearKind:
    """The linear for weights of this format on this device; a format that has none of its own there is decoded.

    With ``int8_activations``, formats that can are multiplied by activations in int8.
    """
    if int8_activations and takes_int8_activations(weight_format):
        return _INTEGERS
    if isinstance(weight_format, Floating) or weight_format.name == "int8":
        return {Device.XLA_CPU: _TILED, Device.INDUCTOR_CPU: _PACKED}.get(device, _PLAIN)
    if weight_format.kind not in _VALUES:
        return _DECODED
    if weight_format.name == "fp8" and device is Device.MATRIX_UNIT:
        return _PLAIN
    if device is Device.INDUCTOR_CPU:
        return _PACKED_INT4 if weight_format.kind == "int4" else _PACKED8
    return {Device.XLA_CPU: _SUMMED, Device.MATRIX_UNIT: _GROUPED}.get(device, _DECODED)


def make_linear(
    weight: LinearWeight,
    device: Device = Device.ANY,
    operations: Operations | None = None,
    int8_activations: bool = False,
) -> nn.Module:
    """The linear for a weight that is held as ``linear_kind`` says; ``operations`` are torch's own by default."""
    return linear_kind(weight.format, device, int8_activations).make(weight, operations or Operations())
