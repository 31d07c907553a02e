"""LLaMA's config.json in both directions, as far as other families' differs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from converters.model.rope import rope_from_hf, scaling_to_hf

if TYPE_CHECKING:
    from converters.model.config import ModelConfig

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def llama_from_hf(fields: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields that are LLaMA's own, from a config.json with all of REQUIRED.

    Raises InputError for rules of RoPE that are not implemented.
    """
    rope_theta, rope_scaling = rope_from_hf(fields)
    return {
        "intermediate_size": fields["intermediate_size"],
        "num_kv_heads": optional(fields, "num_key_value_heads", fields["num_attention_heads"]),
        "norm_eps": optional(fields, "rms_norm_eps", 1e-6),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
    }


def llama_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that are LLaMA's own, as transformers' LlamaConfig reads them."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **({} if config.rope_scaling is None else {"rope_scaling": scaling_to_hf(config.rope_scaling)}),
        "attention_bias": False,
        "mlp_bias": False,
    }


def optional(fields: dict[str, Any], field: str, default: Any) -> Any:
    """A field that may be missing, or null."""
    value = fields.get(field)
    return default if value is None else value
