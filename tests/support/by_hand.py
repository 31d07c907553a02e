"""Weights of the shards by the tests' own arithmetic, from the tensors that a file holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


def unpacked(words: np.ndarray, length: int, axis: int = 1) -> np.ndarray:
    """``length`` integers from -8 to 7 along ``axis`` of int32 words [R, C], eight in each, the lowest bits first."""
    if axis == 0:
        return unpacked(np.ascontiguousarray(words.T), length).T
    nibbles = [words.view(np.uint32) >> shift & 15 for shift in range(0, 32, 4)]
    return np.stack(nibbles, axis=-1).reshape(len(words), -1)[:, :length].astype(np.int64) - 8


def e4m3_values() -> np.ndarray:
    """What each of the 256 bytes stands for: float64, NaN for 127 and 255."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, (bits & 7) / 8
    magnitude = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    magnitude[(bits & 127) == 127] = np.nan
    return np.where(bits >> 7, -magnitude, magnitude)


def decoded(tensors: Mapping[str, torch.Tensor], name: str, width: int) -> np.ndarray:
    """float64 [out, ``width``]: the weight ``name`` of what a file holds, exact; packed words or their elements."""
    parts = stored_values(tensors, name, width)
    values, scale = parts["values"], parts["scale"]
    return (values - parts.get("zero", 0.0)) * scale


def stored_values(tensors: Mapping[str, torch.Tensor], name: str, width: int) -> dict[str, np.ndarray]:
    """``values``, ``scale`` and, if there is one, ``zero`` of a weight: float64 [out, ``width``] each."""
    if name + "_packed" in tensors:
        values = tensors[name + "_packed"].numpy()
        values = unpacked(values, width) if values.dtype == np.int32 else values
    elif tensors[name].dtype == torch.float8_e4m3fn:
        values = e4m3_values()[tensors[name].view(torch.uint8).numpy()]
    else:
        values = tensors[name].numpy()
    parts = {"values": values.astype(np.float64), "scale": tensors[name + "_scale"].double().numpy()}
    if name + "_zero_point" in tensors:
        zero = tensors[name + "_zero_point"].numpy()
        parts["zero"] = (unpacked(zero, len(values), 0) if zero.dtype == np.int32 else zero).astype(np.float64)
    inputs = {key: width // part.shape[1] for key, part in parts.items()}  # that a column stands for
    return {key: part.repeat(inputs[key], axis=1) for key, part in parts.items()}


def quantized_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The weights that tensors by these names hold in a quantized format."""
    return [name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")]
