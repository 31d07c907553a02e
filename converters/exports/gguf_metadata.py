"""What a GGUF file says of a model: architecture, dimensions and RoPE, by llama.cpp's keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from converters.model.config import ModelConfig
from converters.model.families.family import GGUFForm
from converters.model.rope import LinearScaling, Llama3Scaling, inverse_frequencies

# Of general.file_type, by the type of most weights (llama.h, llama_ftype); of general.quantization_version.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_QUANTIZATION_VERSION = 2


def model_metadata(config: ModelConfig, form: GGUFForm, most: str) -> dict[str, Any]:
    """The keys of a model; ``most`` is the type that most of its weights are in."""
    general = {
        "general.architecture": form.architecture,
        "general.name": config.name,
        "general.file_type": _FILE_TYPES[most],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        form.norm_eps: float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    if isinstance(config.rope_scaling, LinearScaling):
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling.factor)}
    return general | {f"{form.architecture}.{key}": value for key, value in own.items()}


def rope_divisors(config: ModelConfig) -> list[float] | None:
    """By what LLaMA 3.1's rule divides the frequency of each pair, for the table of it; None for any other rule."""
    if not isinstance(config.rope_scaling, Llama3Scaling):
        return None
    plain = inverse_frequencies(replace(config, rope_scaling=None))
    return [each / scaled for each, scaled in zip(plain, inverse_frequencies(config), strict=True)]
