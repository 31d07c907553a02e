"""OPT (Zhang et al. 2022), and the variants of it that config.json can describe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from converters.console.errors import InputError, shown
from converters.model.architecture import Architecture, FeedForward, Norm, Positions
from converters.model.config import ModelConfig
from converters.model.families.family import Family, Fields

ARCHITECTURE = Architecture(
    model_type="opt",
    title="OPT",
    prefix="model.decoder.",
    norm=Norm.LAYER,
    positions=Positions.LEARNED,
    feed_forward=FeedForward.RELU,
    attention_norm="self_attn_layer_norm",
    attention_out="out_proj",
    feed_forward_norm="final_layer_norm",  # a block's; the one behind all blocks has the same name without a layer
    feed_forward_in=("fc1",),
    feed_forward_out="fc2",
    final_norm="final_layer_norm",
    biases=True,
    projects=True,
    position_offset=2,
)
_POST_NORM = replace(ARCHITECTURE, norm_first=False, final_norm=None)  # the 350M model
_LAYER_NORM_EPS = 1e-5  # torch's default, which OPT has; config.json has no field for it
_DEFAULTS: Fields = {
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


def read(fields: Fields) -> Fields:
    """As ``Family.read``. Raises InputError for another activation than OPT's and for switches that are none."""
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
        ARCHITECTURE,
        norm_first=norm_first,
        final_norm=ARCHITECTURE.final_norm if ends_with_norm else None,
        biases=fields["enable_bias"],
        norm_weights=fields["layer_norm_elementwise_affine"],
    )
    return {
        "architecture": architecture,
        "intermediate_size": fields["ffn_dim"],
        "num_kv_heads": fields["num_attention_heads"],
        "norm_eps": _LAYER_NORM_EPS,
        "word_embed_proj_dim": fields.get("word_embed_proj_dim"),
    }


def write(config: ModelConfig) -> Fields:
    """As ``Family.write``, for transformers' OPTConfig."""
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


def _preset(name: str, hidden_size: int, heads: int, layers: int, **fields: Any) -> ModelConfig:
    """OPT of these dimensions (Zhang et al. 2022, table 1), its feed-forward size always 4 * dim."""
    return ModelConfig(
        name=name,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden_size // heads,
        vocab_size=50272,
        norm_eps=_LAYER_NORM_EPS,
        tie_word_embeddings=True,
        bos_token_id=2,
        **{"architecture": ARCHITECTURE} | fields,
    )


OPT = Family(
    architecture=ARCHITECTURE,
    model_types={"opt": _DEFAULTS},
    required=("ffn_dim",),
    read=read,
    write=write,
    ignored=("head_dim",),  # its heads share the hidden size, whatever else is said
    gpt2_vocabulary=True,
    presets=(
        _preset("opt-125m", 768, 12, 12),
        _preset("opt-350m", 1024, 16, 24, word_embed_proj_dim=512, architecture=_POST_NORM),
        _preset("opt-1.3b", 2048, 32, 24),
        _preset("opt-2.7b", 2560, 32, 32),
        _preset("opt-6.7b", 4096, 32, 32),
        _preset("opt-13b", 5120, 40, 40),
        _preset("opt-30b", 7168, 56, 48),
        _preset("opt-66b", 9216, 72, 64),
        _preset("opt-175b", 12288, 96, 96),
    ),
)
