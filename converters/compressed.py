"""int8 weights in the compressed-tensors layout: which config.json describes it, and what the values stand for.

The layout (format "int-quantized", https://github.com/vllm-project/compressed-tensors): ``<name>.weight`` int8
[out, in] and ``<name>.weight_scale`` [out, 1]; the weight is their product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from converters.config import ModelConfig
from converters.layout import LM_HEAD, PROJECT_IN, PROJECT_OUT

if TYPE_CHECKING:
    import torch

SCALE_SUFFIX = "_scale"  # behind the name of the weight
_METHOD, _FORMAT = "compressed-tensors", "int-quantized"
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}


def quantization_config(config: ModelConfig, quantized_lm_head: bool) -> dict[str, Any]:
    """The ``quantization_config`` of a config.json for weights of this layout, but for the linears outside the blocks.

    Of those only the output head may be quantized.
    """
    ignored = [] if quantized_lm_head else [LM_HEAD.name]
    if config.word_embed_proj_dim is not None:
        ignored += [config.architecture.prefix + row.name for row in (PROJECT_IN, PROJECT_OUT)]
    return {
        "quant_method": _METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "format": _FORMAT, "weights": _WEIGHTS}},
        "ignore": [name.removesuffix(".weight") for name in ignored],
    }


def is_int8(fields: Any) -> bool:
    """Whether a config.json's fields describe weights of this layout; what they say of activations is no matter.

    Which linears are quantized is told by their tensors, not by ``ignore``.
    """
    described = fields.get("quantization_config") if isinstance(fields, dict) else None
    if not isinstance(described, dict) or described.get("quant_method") != _METHOD:
        return False
    groups = described.get("config_groups")
    if described.get("format") != _FORMAT or not isinstance(groups, dict) or len(groups) != 1:
        return False
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    return isinstance(weights, dict) and all(weights.get(key) == value for key, value in _WEIGHTS.items())


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in]: int8 values [out, in] times their scale [out, 1]."""
    return values.float() * scale.float()
