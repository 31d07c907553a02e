"""The functions that a backend compiles, each of fixed shapes: what llama-run executes, and llama-plan compiles.

tokens are [B, T], slots [T], offsets [B] as in decoder.py. Each takes the cache's tensors and gives them back updated,
so that a backend can write the new ones over the old.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from runtime.model.decoder import Decoder
from runtime.model.kv_cache import KVCache, Layers
from runtime.model.sampling import Controls, sample

Graph = Callable[..., Any]
MakeGraph = Callable[[Decoder, type[KVCache]], Graph]
CACHE_ARGUMENT = 3  # its place among the arguments of each


def fill_graph(decoder: Decoder, cache_type: type[KVCache]) -> Graph:
    """A bucket: a prompt's first tokens into the cache's first slots. They look at nothing but each other."""

    def fill(tokens: Tensor, slots: Tensor, offsets: Tensor, layers: Layers) -> Layers:
        cache = cache_type(layers)
        decoder.fill(tokens, slots, offsets, cache, first=True)
        return cache.layers

    return fill


def later_fill_graph(decoder: Decoder, cache_type: type[KVCache]) -> Graph:
    """A later section of a long prompt, from any slot on; it looks at the whole cache."""

    def fill(tokens: Tensor, slots: Tensor, offsets: Tensor, layers: Layers) -> Layers:
        cache = cache_type(layers)
        decoder.fill(tokens, slots, offsets, cache)
        return cache.layers

    return fill


def greedy_graph(decoder: Decoder, cache_type: type[KVCache]) -> Graph:
    """A decode step: from the last tokens [B, 1] and their slot [1] the most probable next ones and their slot."""

    def step(tokens: Tensor, slots: Tensor, offsets: Tensor, layers: Layers) -> tuple[Tensor, Tensor, Layers]:
        cache = cache_type(layers)
        logits = decoder(tokens, slots, offsets, cache)
        return logits.argmax(-1, keepdim=True), slots + 1, cache.layers

    return step


def sampled_graph(decoder: Decoder, cache_type: type[KVCache]) -> Graph:
    """A decode step whose next tokens are drawn as the controls say; a row's noise is that of its last token's slot."""

    def step(
        tokens: Tensor, slots: Tensor, offsets: Tensor, layers: Layers, controls: Controls
    ) -> tuple[Tensor, Tensor, Layers]:
        cache = cache_type(layers)
        logits = decoder(tokens, slots, offsets, cache)
        temperature, top_k, top_p, noise = controls
        drawn = sample(logits, temperature, top_k, top_p, noise.index_select(0, slots)[0])
        return drawn, slots + 1, cache.layers

    return step


def logits_graph(decoder: Decoder, cache_type: type[KVCache]) -> Graph:
    """A decode step that gives the logits [B, V] in place of the tokens."""

    def logits(tokens: Tensor, slots: Tensor, offsets: Tensor, layers: Layers) -> tuple[Tensor, Layers]:
        cache = cache_type(layers)
        return decoder(tokens, slots, offsets, cache), cache.layers

    return logits
