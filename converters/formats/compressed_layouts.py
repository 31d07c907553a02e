"""The tensors that compressed-tensors' layouts hold of a weight, by what follows its name, and their shapes.

https://github.com/vllm-project/compressed-tensors, ``compressors``. ``weight_packed`` holds integers in words of 32
bits, each with half its range added; ``weight_shape`` says how wide the weight is. Zero points are packed along the
outputs.
"""

from __future__ import annotations

from typing import Any

from converters.formats.packed_integers import word_count

PACKED, PLAIN, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
# Suffixes; values that aren't packed have the weight's own name.
PACKED_VALUES, SCALES, ZEROS, SHAPE = "_packed", "_scale", "_zero_point", "_shape"
# Of a config group: every token's activations by the largest magnitude, as they come.
INT8_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def layout_shapes(group: dict[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """By suffix, the shapes of the tensors that stand for a weight [out, in] in a config group, in the files' order."""
    weights, (rows, inputs) = group["weights"], shape
    bits, size = weights["num_bits"], weights.get("group_size")
    groups = 1 if size is None else inputs // size
    packed = group["format"] == PACKED
    shapes = {PACKED_VALUES: (rows, word_count(inputs, bits))} if packed else {"": shape}
    shapes[SCALES] = (rows, groups)
    if not weights["symmetric"]:
        shapes[ZEROS] = (word_count(rows, bits) if packed else rows, groups)
    return shapes | ({SHAPE: (2,)} if packed else {})
