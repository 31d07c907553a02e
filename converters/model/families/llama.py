"""LLaMA, with the models that are built alike under other names (Touvron et al. 2023, Grattafiori et al. 2024)."""

from __future__ import annotations

from typing import Any

from converters.console.errors import InputError, shown
from converters.model.architecture import Architecture, FeedForward, Norm, Positions
from converters.model.config import ModelConfig
from converters.model.families.family import Family, Fields, GGUFForm
from converters.model.hf_fields import MAX_POSITIONS, optional
from converters.model.rope import Llama3Scaling, rope_from_hf, scaling_to_hf

ARCHITECTURE = Architecture(
    model_type="llama",
    title="LLaMA",
    prefix="model.",
    norm=Norm.RMS,
    positions=Positions.ROTARY,
    feed_forward=FeedForward.SWIGLU,
    attention_norm="input_layernorm",
    attention_out="o_proj",
    feed_forward_norm="post_attention_layernorm",
    feed_forward_in=("mlp.gate_proj", "mlp.up_proj"),
    feed_forward_out="mlp.down_proj",
    final_norm="norm",
)
GGUF = GGUFForm(
    architecture="llama",
    model_names={
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    },
    block_names={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    norm_eps="attention.layer_norm_rms_epsilon",
    interleaved=True,
)


def check(fields: Fields) -> None:
    """Raise InputError for a sliding window that hides something, and for another activation."""
    window, positions = fields.get("sliding_window"), fields.get("max_position_embeddings") or MAX_POSITIONS
    # A window as long as the longest context hides nothing from any token.
    if window and not (type(window) is int and type(positions) is int and window >= positions):
        raise InputError(
            f"config.json asks for a sliding window of {shown(window)} tokens (sliding_window) within "
            f"{shown(positions)} positions, which the decoder does not implement. For contexts no longer than the "
            "window, set max_position_embeddings to it."
        )
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"config.json asks for the activation {shown(fields['hidden_act'])}; LLaMA's is 'silu'.")


def read(fields: Fields) -> Fields:
    """As ``Family.read``. Raises InputError for rules of RoPE that are not implemented."""
    rope_theta, rope_scaling = rope_from_hf(fields)
    return {
        "architecture": ARCHITECTURE,
        "intermediate_size": fields["intermediate_size"],
        "num_kv_heads": optional(fields, "num_key_value_heads", fields["num_attention_heads"]),
        "norm_eps": optional(fields, "rms_norm_eps", 1e-6),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
    }


def write(config: ModelConfig) -> Fields:
    """As ``Family.write``, for transformers' LlamaConfig."""
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


def _ffn_size(hidden_size: int) -> int:
    """LLaMA's rule (Touvron et al. 2023, section 2.2): 2/3 of 4 * dim, rounded up to a multiple of 256."""
    return -(-(2 * 4 * hidden_size // 3) // 256) * 256


def _preset(name: str, hidden_size: int, heads: int, layers: int, **fields: Any) -> ModelConfig:
    """LLaMA 1 of these dimensions, or with other ``fields`` a later model."""
    sizes = {
        "intermediate_size": _ffn_size(hidden_size),
        "num_kv_heads": heads,
        "head_dim": hidden_size // heads,
        "norm_eps": 1e-6,
    }
    return ModelConfig(
        name=name,
        architecture=ARCHITECTURE,
        hidden_size=hidden_size,
        num_heads=heads,
        num_layers=layers,
        **sizes | fields,
    )


_LLAMA_2 = {"norm_eps": 1e-5, "max_position_embeddings": 4096}
_CODE_LLAMA = {"norm_eps": 1e-5, "max_position_embeddings": 16384, "rope_theta": 1e6}
_LLAMA_3 = {
    "norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_ids": (128001, 128009),  # <|end_of_text|>, <|eot_id|>
    "num_kv_heads": 8,
}
_LLAMA_3_1 = _LLAMA_3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192),
    "eos_token_ids": (128001, 128008, 128009),  # and <|eom_id|>
}
# Table 1 of "The Path to Achieve Ultra-Low Inference Latency With LLaMA 65B on PyTorch/XLA", with 13B and a small
# one for demos and tests. 175B is OPT-175B's dimensions on the LLaMA architecture. Below them the models of Touvron
# et al. 2023 (LLaMA 2), Roziere et al. 2023 (Code Llama) and Grattafiori et al. 2024 (LLaMA 3, and 3.1 405B).
PRESETS = (
    _preset("tiny", 256, 8, 4),
    _preset("7B", 4096, 32, 32),
    _preset("13B", 5120, 40, 40),
    _preset("33B", 6656, 52, 60),
    _preset("65B", 8192, 64, 80),
    _preset("175B", 12288, 96, 96),
    _preset("llama-2-7b", 4096, 32, 32, **_LLAMA_2),
    _preset("llama-2-13b", 5120, 40, 40, **_LLAMA_2),
    _preset("llama-2-70b", 8192, 64, 80, intermediate_size=28672, num_kv_heads=8, **_LLAMA_2),
    _preset("code-llama-34b", 8192, 64, 48, intermediate_size=22016, num_kv_heads=8, **_CODE_LLAMA),
    _preset("llama-3-8b", 4096, 32, 32, intermediate_size=14336, **_LLAMA_3),
    _preset("llama-3-70b", 8192, 64, 80, intermediate_size=28672, **_LLAMA_3),
    _preset("llama-3-405b", 16384, 128, 126, intermediate_size=53248, **_LLAMA_3_1),
)
LLAMA = Family(
    architecture=ARCHITECTURE,
    # Mistral is LLaMA with a sliding window, which later versions leave off.
    model_types={
        "llama": {},
        "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    },
    required=("intermediate_size",),
    check=check,
    read=read,
    write=write,
    gguf=GGUF,
    presets=PRESETS,
)
