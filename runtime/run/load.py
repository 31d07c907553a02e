"""Loading a decoder and its cache onto a device, from shards on the disk, one tensor at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from converters.console.progress import Advance
from converters.model.config import ModelConfig
from converters.model.parameters import EMBEDDING
from quantize.shards.chip_weights import ChipWeights
from quantize.shards.partition import plan_heads
from runtime.devices.backend import Backend
from runtime.model.decoder import Decoder, Head
from runtime.model.decoder_tensors import (
    DecoderParameters,
    DecoderTensor,
    collect,
    decoder_parameters,
    head_parameters,
)
from runtime.model.kv_cache import HEAD_AXIS, KVCache
from runtime.model.sizing import cache_shape
from runtime.model.weights import Weights

if TYPE_CHECKING:
    from runtime.devices.xla import TPUForm


def load_decoder(
    shards: ChipWeights, config: ModelConfig, dtype: torch.dtype, backend: Backend, advance: Advance
) -> tuple[Decoder, int]:
    """The decoder on the device, and the bytes of parameters that each chip holds; arguments as in ``load_tensors``."""
    tensors, bytes_per_chip = load_tensors(shards, config, backend, advance)
    return make_decoder(config, dtype, backend, tensors), bytes_per_chip


def load_tensors(
    shards: ChipWeights, config: ModelConfig, backend: Backend, advance: Advance
) -> tuple[DecoderParameters, int]:
    """The parameters for ``make_decoder`` on the device, and the bytes of them that each chip holds.

    ``config`` is the shards' own, possibly cut to fewer layers; ``advance`` is told bytes as they are loaded. Raises
    InputError where a file is missing or isn't what the manifest says.
    """
    bytes_per_chip = 0

    def load(tensor: DecoderTensor) -> Any:
        nonlocal bytes_per_chip
        loaded = backend.load(shards, tensor)
        nbytes = backend.nbytes(loaded)
        bytes_per_chip += nbytes // (1 if tensor.shard is None else backend.chips)
        advance(nbytes, tensor.name)
        return loaded

    wanted = decoder_parameters(config, shards.scheme, backend.chips, backend.fuse_bytes)
    return collect(wanted, load), bytes_per_chip


def load_head(shards: ChipWeights, dtype: torch.dtype, backend: Backend, advance: Advance) -> Head:
    """A model's final norm and output head alone, on the device; arguments as in ``load_tensors``."""
    config = shards.config
    wanted = head_parameters(config, shards.scheme, backend.chips, backend.fuse_bytes)

    def load(tensor: DecoderTensor) -> Any:
        loaded = backend.load(shards, tensor)
        advance(backend.nbytes(loaded), tensor.name)
        return loaded

    weights = Weights(collect(wanted, load), backend.form.make_linear)
    embedding = config.architecture.prefix + EMBEDDING.name
    head = Head(weights, config, dtype, backend.form, weights.take(embedding) if config.tie_word_embeddings else None)
    weights.check_all_taken()
    return head.eval()


def make_decoder(
    config: ModelConfig, dtype: torch.dtype, backend: Backend | TPUForm, parameters: DecoderParameters
) -> Decoder:
    """The decoder over parameters that are already on the device, as ``collect`` returns them."""
    heads = plan_heads(config.num_heads, config.num_kv_heads, backend.chips)
    return Decoder(config, heads, dtype, parameters, backend.hold, backend.form).eval()


def make_cache(
    config: ModelConfig, backend: Backend | TPUForm, batch_size: int, max_seq_len: int, dtype: torch.dtype
) -> KVCache:
    """An empty cache on the device, split over the chips by KV heads; ``dtype`` may be int8."""
    shape = cache_shape(config, backend.chips, batch_size, max_seq_len)
    tensors = [(shape, dtype)] * 2
    if dtype == torch.int8:
        tensors += [((*shape[:-1], 1), torch.float32)] * 2
    held = [(sizes, backend.cache_type.stored_as(each)) for sizes, each in tensors]
    return KVCache([[backend.zeros(*tensor, HEAD_AXIS) for tensor in held] for _ in range(config.num_layers)])
