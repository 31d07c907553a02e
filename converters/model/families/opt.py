"""OPT's config.json in both directions: which variant of the architecture it describes, and its dimensions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError, shown
from converters.model.architecture import OPT

if TYPE_CHECKING:
    from converters.model.config import ModelConfig

REQUIRED = ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "vocab_size")
LAYER_NORM_EPS = 1e-5  # torch's default, which OPT has; config.json has no field for it
# What transformers assumes where config.json is silent.
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
}
_SWITCHES = ("do_layer_norm_before", "_remove_final_layer_norm", "enable_bias", "layer_norm_elementwise_affine")


def opt_from_hf(fields: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields that are OPT's own, from a config.json completed by DEFAULTS and with all of REQUIRED.

    Raises InputError for another activation than OPT's and for switches that are none.
    """
    if fields["activation_function"] != "relu":
        raise InputError(
            f"config.json asks for the activation {shown(fields['activation_function'])} (activation_function), which "
            "the decoder does not implement; OPT's is 'relu'."
        )
    for switch in _SWITCHES:
        if type(fields[switch]) is not bool:
            raise InputError(f"config.json has {switch} {shown(fields[switch])}; it must be true or false.")
    norm_first = fields["do_layer_norm_before"]
    ends_with_norm = norm_first and not fields["_remove_final_layer_norm"]
    architecture = replace(
        OPT,
        norm_first=norm_first,
        final_norm=OPT.final_norm if ends_with_norm else None,
        biases=fields["enable_bias"],
        norm_weights=fields["layer_norm_elementwise_affine"],
    )
    return {
        "architecture": architecture,
        "intermediate_size": fields["ffn_dim"],
        "num_kv_heads": fields["num_attention_heads"],
        "norm_eps": LAYER_NORM_EPS,
        "word_embed_proj_dim": fields.get("word_embed_proj_dim"),
    }


def opt_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that are OPT's own, as transformers' OPTConfig reads them."""
    architecture = config.architecture
    return {
        "architectures": ["OPTForCausalLM"],
        "activation_function": "relu",
        "ffn_dim": config.intermediate_size,
        "word_embed_proj_dim": config.word_size,
        "do_layer_norm_before": architecture.norm_first,
        "_remove_final_layer_norm": architecture.norm_first and architecture.final_norm is None,
        "enable_bias": architecture.biases,
        "layer_norm_elementwise_affine": architecture.norm_weights,
    }
