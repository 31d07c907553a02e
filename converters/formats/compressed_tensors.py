"""Weights in the compressed-tensors layout as this tool writes them: how config.json describes it.

The layout (format "int-quantized", https://github.com/vllm-project/compressed-tensors): ``<name>.weight`` int8
[out, in] and ``<name>.weight_scale`` [out, 1]; the weight is their product.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from converters.model.config import ModelConfig
from converters.model.parameters import LM_HEAD, parameters

SCALE_SUFFIX = "_scale"  # after the name of the weight
_METHOD, _FORMAT = "compressed-tensors", "int-quantized"
_SEVERAL_FORMATS = "mixed-precision"  # in place of a format where groups have different ones


def weights_group(
    layout: str, kind: str, bits: int, group_size: int | None = None, zero_points: bool = False
) -> dict[str, Any]:
    """What ``config_groups`` says of weights: ``layout`` is one of compressed-tensors' formats, ``kind`` int or float.

    With a ``group_size`` there is a scale for so many inputs, else one per output channel.
    """
    weights = {"num_bits": bits, "type": kind, "symmetric": not zero_points, "strategy": "channel", "dynamic": False}
    if group_size is not None:
        weights |= {"strategy": "group", "group_size": group_size}
    return {"format": layout, "weights": weights}


INT8_GROUP = weights_group(_FORMAT, "int", 8)


def quantization_config(
    config: ModelConfig, groups: Sequence[tuple[dict[str, Any], Collection[str]]]
) -> dict[str, Any]:
    """The ``quantization_config`` for config.json where weights are as ``groups`` say: each what it says, and of which.

    What it says are the ``format`` and the ``weights`` of a config group; of which, the names of weights. Every other
    linear is listed as ignored, even an output head that is tied to the embedding. One group is for all linears that
    are not; several list theirs.
    """
    linears = [LM_HEAD.name, *(parameter.name for parameter in parameters(config) if parameter.row.is_linear)]
    quantized = {name for _, names in groups for name in names}
    layouts = {group["format"] for group, _ in groups}
    return {
        "quant_method": _METHOD,
        "format": layouts.pop() if len(layouts) == 1 else _SEVERAL_FORMATS,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": ["Linear"] if len(groups) == 1 else _modules(names), **group}
            for number, (group, names) in enumerate(groups)
        },
        "ignore": _modules(name for name in dict.fromkeys(linears) if name not in quantized),
    }


def _modules(names: Iterable[str]) -> list[str]:
    """Of weights, the linears."""
    return [name.removesuffix(".weight") for name in names]
