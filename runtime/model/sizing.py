"""How large a model is and how much of it each chip holds, exactly and by the post's formulas.

Exact sizes follow from what the shards hold (``quantize/shards/stored.py``) and how it is split
(``quantize/shards/partition.py``), so they equal the files'. The post is "The Path to Achieve Ultra-Low Inference
Latency With LLaMA 65B on PyTorch/XLA", sections Model Sizing, Cache Sizing and TPU v4 Hardware Sizing.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from converters.formats.safetensors import CODES, ITEM_BYTES
from converters.model.config import ModelConfig
from converters.model.parameters import EMBEDDING, parameters
from quantize.shards.partition import plan_heads
from quantize.shards.scheme import Scheme
from quantize.shards.stored import StoredParameter, stored_parameters

BFLOAT16_BYTES = 2
# What a KV cache may be held in: bytes of one element of a key or value, and of the scale that each key and value has.
CACHE_DTYPES = {"bfloat16": (2, 0), "float32": (4, 0), "int8": (1, 4)}
# What activations are multiplied by weights in: as they are, or rounded to int8 for each token.
ACTIVATIONS = ("auto", "int8")
# "Each TPU v4 chip has 32GB of available High-Bandwidth Memory": of 10^9 bytes, as its Table 2 counts.
POST_HBM_BYTES = 32 * 10**9


def parameter_count(config: ModelConfig) -> int:
    """The model's parameters, without padding; a tied output head is counted once, with the embedding."""
    first_layer = parameters(config.cut(1))
    return sum(p.elements * (config.num_layers if p.in_block else 1) for p in first_layer)


def parameter_bytes_per_chip(config: ModelConfig, scheme: Scheme, chips: int) -> int:
    """Bytes of weights and scales that each of ``chips`` chips holds, padding included: its file without the header.

    On one chip this is the model itself, unsplit.
    """
    return sum(count * _stored_bytes(config, stored, chips) for stored, count in _kinds(config, scheme))


def cache_shape(config: ModelConfig, chips: int, batch_size: int, max_seq_len: int) -> tuple[int, int, int, int]:
    """[B, H, S, D] of one layer's keys (and of its values) over all chips, repeated and zero heads included."""
    heads = plan_heads(config.num_heads, config.num_kv_heads, chips)
    return batch_size, heads.kv_places, max_seq_len, config.head_dim


def cache_bytes_per_chip(
    config: ModelConfig, chips: int, batch_size: int, max_seq_len: int, dtype: str = "bfloat16"
) -> int:
    """Bytes of keys and values that each chip holds: 2 * layers * B * (H / chips) * S * (D * item + scale).

    ``item`` and ``scale`` are those of ``dtype``, one of CACHE_DTYPES.
    """
    item_bytes, scale_bytes = CACHE_DTYPES[dtype]
    batch, heads, slots, head_dim = cache_shape(config, chips, batch_size, max_seq_len)
    return 2 * config.num_layers * batch * (heads // chips) * slots * (head_dim * item_bytes + scale_bytes)


def decode_bytes_per_chip(
    config: ModelConfig,
    scheme: Scheme,
    chips: int,
    batch_size: int,
    max_seq_len: int,
    cache_dtype: str = "bfloat16",
) -> int:
    """Bytes that each chip must read from its HBM for one decode step.

    That is every weight with its scale, and the whole cache, because attention of fixed shape
    reads all slots. Only one row per token is read of learned positions, and of the embedding unless it is also the
    output head. Counted for a chip that holds the rows of the whole batch, which is the slowest.
    """
    weights = 0
    for stored, count in _kinds(config, scheme):
        parameter = stored.parameter
        head_too = parameter.row is EMBEDDING and config.tie_word_embeddings
        if parameter.row.looked_up and not head_too:
            weights += batch_size * parameter.width * ITEM_BYTES[CODES[stored.tensors[0].part.file_dtype]]
        else:
            weights += count * _stored_bytes(config, stored, chips)
    return weights + cache_bytes_per_chip(config, chips, batch_size, max_seq_len, cache_dtype)


def min_chips(total_bytes: int, hbm_bytes: int) -> int:
    """The fewest chips that together hold ``total_bytes`` in their HBM, without padding: Table 2's last column."""
    return -(-total_bytes // hbm_bytes)


def post_parameters(config: ModelConfig) -> int:
    """The post's N = 12 * dim^2 * n_layers: without vocabulary and norms, and with an MLP of 8 * dim^2 weights."""
    return 12 * config.hidden_size**2 * config.num_layers


def post_parameter_bytes(config: ModelConfig) -> int:
    """Bytes of the post's N in bfloat16."""
    return BFLOAT16_BYTES * post_parameters(config)


def post_cache_bytes(config: ModelConfig, batch_size: int, max_seq_len: int) -> int:
    """The post's total_cache_size = n_layers * 2 * (B * S * dim) * 2 bytes; it counts query heads, so not for GQA."""
    return config.num_layers * 2 * batch_size * max_seq_len * config.hidden_size * BFLOAT16_BYTES


@lru_cache(maxsize=64)
def _kinds(config: ModelConfig, scheme: Scheme) -> tuple[tuple[StoredParameter, int], ...]:
    """One stored parameter of every kind that takes as much, in whatever layer, and how many the model has."""
    if not scheme.overrides:  # all layers are alike
        first = stored_parameters(config.cut(1), scheme)
        return tuple((each, config.num_layers if each.parameter.in_block else 1) for each in first)
    every = stored_parameters(config, scheme)
    counts = Counter((each.parameter.row, each.format, each.ffn_group) for each in every)
    kinds = {(each.parameter.row, each.format, each.ffn_group): each for each in every}
    return tuple((kinds[kind], count) for kind, count in counts.items())


def _stored_bytes(config: ModelConfig, stored: StoredParameter, chips: int) -> int:
    """Bytes of one stored parameter, all its tensors, on each chip."""
    return sum(tensor.spec(config, chips).nbytes for tensor in stored.tensors)
