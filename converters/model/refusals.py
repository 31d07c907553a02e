"""What a config.json may ask for that changes the arithmetic and that the decoder does not implement."""

from __future__ import annotations

from typing import Any

from converters.console.errors import InputError, shown
from converters.model.architecture import OPT
from converters.model.families.opt import DEFAULTS as OPT_DEFAULTS

# The model types that are this decoder's, with what transformers assumes for them where config.json is silent and
# LLaMA's own default is another. Mistral is LLaMA with a sliding window, which later versions leave off.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    OPT.model_type: OPT_DEFAULTS,
}
MAX_POSITIONS = 2048  # LLaMA's, where config.json is silent
_FEATURES = {
    "attention_bias": "biases in the attention",
    "mlp_bias": "biases in the MLP",
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
}


def check_features(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json, completed by the defaults of its model type.

    Raises InputError for another model type, for a feature that the decoder lacks, by name, and for quantized weights.
    """
    for field, feature in _FEATURES.items():
        if fields.get(field):
            raise InputError(f"config.json asks for {feature} ({field}), which the decoder does not implement.")
    kind = fields.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        known = ", ".join(repr(name) for name in MODEL_TYPES)
        feature = " (mixture of experts)" if kind == "mixtral" else ""
        raise InputError(f"config.json is of model type {shown(kind)}{feature}; this tool converts {known}.")
    fields = MODEL_TYPES[kind] | fields
    _check_unquantized(fields)
    if kind == OPT.model_type:
        return fields | {"head_dim": None}  # its heads share the hidden size, whatever else is said
    _check_window(fields)
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"config.json asks for the activation {shown(fields['hidden_act'])}; LLaMA's is 'silu'.")
    return fields


def _check_window(fields: dict[str, Any]) -> None:
    """A sliding window as long as the longest context hides nothing from any token."""
    window, positions = fields.get("sliding_window"), fields.get("max_position_embeddings") or MAX_POSITIONS
    if not window or (type(window) is int and type(positions) is int and window >= positions):
        return
    raise InputError(
        f"config.json asks for a sliding window of {shown(window)} tokens (sliding_window) within "
        f"{shown(positions)} positions, which the decoder does not implement. For contexts no longer than the window, "
        "set max_position_embeddings to it."
    )


def _check_unquantized(fields: dict[str, Any]) -> None:
    quantized = fields.get("quantization_config") or fields.get("compression_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        by = f" by {shown(method)}" if method else ""
        raise InputError(
            f"config.json describes a model that is already quantized{by}; convert its unquantized original."
        )
