"""The layouts of compressed-tensors: how a weight is stored in each.

Of integers ``weight`` or, packed, ``weight_packed``, ``weight_scale`` and ``weight_zero_point``; in the order that
``weight_g_idx`` gives, where inputs are ordered by their activations. Values packed in 32-bit words have 2^(bits - 1)
added; zero points are packed along the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from converters.console.errors import InputError
from converters.formats.word_integers import Period, unpack_words
from converters.sources.huggingface.quantized.codec import SCALE_DTYPES, Codec, IntegerCodec, need, only
from converters.sources.huggingface.quantized.float4_codec import Float4Codec
from converters.sources.huggingface.quantized.float8_codec import Float8Codec
from converters.sources.huggingface.quantized.stripes import Stripes

if TYPE_CHECKING:
    import torch

    from converters.model.parameters import Parameter
    from converters.sources.huggingface.surplus import Held

_ACT_ORDER = "weight_g_idx"


class Weights(NamedTuple):
    """What a config group says of weights."""

    layout: str
    kind: str  # int or float
    bits: int
    zero_points: bool
    strategy: str
    group: int | None  # the inputs that share a scale, where the strategy has groups
    block: tuple[int, int] | None  # the outputs and inputs that share one, where it has blocks
    act_order: bool  # whether inputs are in groups by their activations


class Layout(NamedTuple):
    """What may be in a layout: kinds and bits of values, strategies, and whether there may be zero points."""

    values: tuple[tuple[str, int], ...]
    strategies: tuple[str, ...]
    zero_points: bool = False


LAYOUTS = {
    "int-quantized": Layout((("int", 8), ("int", 4)), ("tensor", "channel", "group"), zero_points=True),
    "pack-quantized": Layout((("int", 4), ("int", 8)), ("channel", "group"), zero_points=True),
    "float-quantized": Layout((("float", 8),), ("tensor", "channel", "group", "block")),
    "nvfp4-pack-quantized": Layout((("float", 4),), ("tensor_group",)),
    "mxfp4-pack-quantized": Layout((("float", 4),), ("group",)),
}
MakeCodec = Callable[["Parameter", Weights, "Mapping[str, Held]", Stripes], Codec]


def scale_of(
    tensors: Mapping[str, Held], part: str, name: str, shape: tuple[int, int], strategy: str, groups: int
) -> Held:
    """A weight's scale, one for the whole tensor or [out, groups]."""
    if strategy != "tensor":
        return need(tensors, part, name, (shape[0], groups), SCALE_DTYPES)
    single = () if part in tensors and tensors[part].shape == () else (1,)
    return need(tensors, part, name, single, SCALE_DTYPES)


@dataclass
class _Integers(IntegerCodec):
    """int8 values as they are, fewer bits too: "int-quantized"."""

    def values(self, start: int, stop: int) -> torch.Tensor:
        values, middle = self.tensors["weight"].rows(start, stop), 1 << self.bits - 1
        if self.bits < 8 and (values.amin() < -middle or values.amax() >= middle):
            raise InputError(f"{self.name} holds values that are no integers of {self.bits} bits, as config.json says.")
        return values

    def scale(self, start: int, stop: int) -> torch.Tensor:
        held = self.tensors["weight_scale"]
        return held.rows(start, stop) if len(held.shape) == 2 else held.whole().expand(stop - start, 1)

    def zeros(self, start: int, stop: int) -> torch.Tensor | None:
        if not self.zero_points:
            return None
        held = self.tensors["weight_zero_point"]
        return held.rows(start, stop) if len(held.shape) == 2 else held.whole().expand(stop - start, 1)


@dataclass
class _Packed(_Integers):
    """Integers in 32-bit words: "pack-quantized"."""

    def values(self, start: int, stop: int) -> torch.Tensor:
        return unpack_words(self.tensors["weight_packed"].rows(start, stop), self.bits, self.shape[1])

    def zeros(self, start: int, stop: int) -> torch.Tensor | None:
        if not self.zero_points:
            return None
        first, last, begin = Period.of(self.bits).around(start, stop)
        words = self.tensors["weight_zero_point"].rows(first, last).T.contiguous()
        return unpack_words(words, self.bits, stop - begin)[:, start - begin :].T.contiguous()


def _integers(parameter: Parameter, weights: Weights, tensors: Mapping[str, Held], stripes: Stripes) -> Codec:
    name, shape = parameter.name, parameter.shape
    groups, parts = _groups(name, shape, weights.group), ["weight", "weight_scale"]
    need(tensors, "weight", name, shape, ("int8",))
    scale = scale_of(tensors, "weight_scale", name, shape, weights.strategy, groups)
    if weights.zero_points:
        parts.append("weight_zero_point")
        need(tensors, "weight_zero_point", name, scale.shape, ("int8",))
    return _codec(_Integers, parameter, weights, tensors, stripes, tuple(parts), scale.dtype)


def _packed(parameter: Parameter, weights: Weights, tensors: Mapping[str, Held], stripes: Stripes) -> Codec:
    name, shape, period = parameter.name, parameter.shape, Period.of(weights.bits)
    groups, parts = _groups(name, shape, weights.group), ["weight_packed", "weight_scale", "weight_shape"]
    need(tensors, "weight_packed", name, (shape[0], period.words_for(shape[1])), ("int32",))
    scale = need(tensors, "weight_scale", name, (shape[0], groups), SCALE_DTYPES)
    said = need(tensors, "weight_shape", name, (2,), ("int64", "int32")).whole().tolist()
    if said != list(shape):
        raise InputError(f"{name} is of shape {said} by its weight_shape, but config.json calls for {list(shape)}.")
    if weights.zero_points:
        parts.append("weight_zero_point")
        need(tensors, "weight_zero_point", name, (period.words_for(shape[0]), groups), ("int32",))
    return _codec(_Packed, parameter, weights, tensors, stripes, tuple(parts), scale.dtype)


def _codec(
    kind: type[IntegerCodec],
    parameter: Parameter,
    weights: Weights,
    tensors: Mapping[str, Held],
    stripes: Stripes,
    parts: tuple[str, ...],
    scale_dtype: str,
) -> Codec:
    shape, g_idx = parameter.shape, None
    if weights.act_order:
        parts = (*parts, _ACT_ORDER)
        g_idx = _act_order(tensors, parameter.name, shape[1], weights.group)
    only(tensors, parts)
    fields = (weights.bits, weights.group, scale_dtype, weights.zero_points)
    return kind(parameter.name, shape, *fields, tensors, stripes, g_idx)


def _act_order(tensors: Mapping[str, Held], name: str, inputs: int, group: int) -> torch.Tensor | None:
    """The group of every input, int64 [in]; None where groups are of consecutive ones. Any -1 says that they are.

    Raises InputError where a group hasn't as many inputs as it has to.
    """
    import torch

    found = need(tensors, _ACT_ORDER, name, (inputs,), ("int32", "int64")).whole().long()
    consecutive = torch.arange(inputs) // group
    if -1 in found or torch.equal(found, consecutive):
        return None
    if not torch.equal(found.sort().values, consecutive):
        raise InputError(f"{tensors[_ACT_ORDER].path}: {name}.g_idx doesn't give every group {group} inputs.")
    return found


def _groups(name: str, shape: tuple[int, int], group: int | None) -> int:
    """How many scales an output has."""
    if group is not None and shape[1] % group:
        raise InputError(
            f"{name} has {shape[1]} inputs, which config.json's group_size {group} doesn't divide: compressed-tensors "
            "has no such weights."
        )
    return 1 if group is None else shape[1] // group


def _float8(parameter: Parameter, weights: Weights, tensors: Mapping[str, Held], stripes: Stripes) -> Codec:
    name, shape = parameter.name, parameter.shape
    only(tensors, ("weight", "weight_scale"))
    if weights.block is None:
        groups = _groups(name, shape, weights.group)
        scale = scale_of(tensors, "weight_scale", name, shape, weights.strategy, groups)
    else:
        blocks = tuple(-(-size // block) for size, block in zip(shape, weights.block, strict=True))
        scale = need(tensors, "weight_scale", name, blocks, SCALE_DTYPES)
    values = need(tensors, "weight", name, shape, ("float8_e4m3fn",))
    return Float8Codec(name, shape, values, scale, weights.group, weights.block)


def _float4(parameter: Parameter, weights: Weights, tensors: Mapping[str, Held], stripes: Stripes) -> Codec:
    name, (out, inputs) = parameter.name, parameter.shape
    is_nvidia = weights.layout.startswith("nvfp4")
    parts = ("weight_packed", "weight_scale", *(["weight_global_scale"] if is_nvidia else []))
    only(tensors, parts)
    groups = _groups(name, parameter.shape, weights.group)
    packed = need(tensors, "weight_packed", name, (out, inputs // 2), ("uint8",))
    scale = need(tensors, "weight_scale", name, (out, groups), ("float8_e4m3fn" if is_nvidia else "uint8",))
    whole = need(tensors, "weight_global_scale", name, (1,), ("float32",)) if is_nvidia else None
    return Float4Codec(name, parameter.shape, packed, scale, whole, weights.group)


CODECS: dict[str, MakeCodec] = {
    "int-quantized": _integers,
    "pack-quantized": _packed,
    "float-quantized": _float8,
    "nvfp4-pack-quantized": _float4,
    "mxfp4-pack-quantized": _float4,
}
