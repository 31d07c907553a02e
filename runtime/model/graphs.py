"""The functions of fixed shapes that a backend compiles: llama-run executes them, llama-plan only compiles them.

tokens are [B, T], slots [T], offsets [B] as in decoder.py. A backend knows only tensors and lists of them. So a
compiled function takes the cache's tensors and returns them updated as its last result, which lets it write the new
ones over the old. The functions below work on a cache; only ``_graph`` converts between it and its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from runtime.model.decoder import Decoder
from runtime.model.kv_cache import KVCache, Layers
from runtime.model.sampling import Controls, sample

Graph = Callable[..., tuple[Any, ...]]  # arguments: tokens, slots, offsets, the cache's tensors, then any others
MakeGraph = Callable[[Decoder, type[KVCache]], Graph]
CACHE_ARGUMENT = 3  # index of the cache's tensors among a graph's arguments

_SCORED_LOGITS = 1 << 24  # logits computed at once, over all rows: 64 MiB in float32


def _graph(compute: Callable[..., tuple[Tensor, ...]]) -> MakeGraph:
    """Turn ``compute`` (of a decoder, tokens, slots, offsets, a cache, and more) into a function that makes the graph
    for a given decoder and kind of cache.
    """

    @wraps(compute)
    def make(decoder: Decoder, cache_type: type[KVCache]) -> Graph:
        def graph(tokens: Tensor, slots: Tensor, offsets: Tensor, layers: Layers, *more: Any) -> tuple[Any, ...]:
            cache = cache_type(layers)
            return (*compute(decoder, tokens, slots, offsets, cache, *more), cache.layers)

        graph.__name__ = compute.__name__
        return graph

    return make


@_graph
def fill_graph(decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache) -> tuple[()]:
    """A bucket: write a prompt's first tokens to the cache's first slots. They attend only to each other."""
    decoder.fill(tokens, slots, offsets, cache, first=True)
    return ()


@_graph
def later_fill_graph(decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache) -> tuple[()]:
    """A later section of a long prompt, from any slot on; it attends to the whole cache."""
    decoder.fill(tokens, slots, offsets, cache)
    return ()


@_graph
def greedy_graph(
    decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache
) -> tuple[Tensor, Tensor]:
    """A decode step: the last tokens [B, 1] and their slot [1] give the most probable next tokens and their slot."""
    logits = decoder(tokens, slots, offsets, cache)
    return logits.argmax(-1, keepdim=True), slots + 1


@_graph
def sampled_graph(
    decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache, controls: Controls
) -> tuple[Tensor, Tensor]:
    """A decode step that draws the next tokens as the controls say, with the noise for the last token's slot."""
    logits = decoder(tokens, slots, offsets, cache)
    temperature, top_k, top_p, noise = controls
    return sample(logits, temperature, top_k, top_p, noise.index_select(0, slots)[0]), slots + 1


@_graph
def logits_graph(decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache) -> tuple[Tensor]:
    """A decode step that returns the logits [B, V] in place of tokens."""
    return (decoder(tokens, slots, offsets, cache),)


@_graph
def score_graph(
    decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache, following: Tensor
) -> tuple[Tensor]:
    """``fill_graph``, also returning log-probabilities [B, T]: of each ``following`` token [B, T] after its own."""
    return (_scores(decoder, decoder.fill(tokens, slots, offsets, cache, first=True), following),)


@_graph
def later_score_graph(
    decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache, following: Tensor
) -> tuple[Tensor]:
    """``later_fill_graph``, also returning log-probabilities as ``score_graph`` does."""
    return (_scores(decoder, decoder.fill(tokens, slots, offsets, cache), following),)


def _scores(decoder: Decoder, x: Tensor, following: Tensor) -> Tensor:
    """Log-probabilities, float32 [B, T], of ``following`` [B, T] given the last layer's output x [B, T, E].

    Logits are computed for some positions at a time: those of a whole section would be the largest tensor of all.
    """
    count = max(1, _SCORED_LOGITS // (len(x) * decoder.vocab_size))
    parts = zip(x.split(count, dim=1), following.split(count, dim=1), strict=True)
    scores = [_log_probabilities(decoder.head(part)[..., : decoder.vocab_size], tokens) for part, tokens in parts]
    return torch.cat(scores, dim=1)


def _log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-softmax of logits [B, T, V] at ``tokens`` [B, T]: float32 [B, T].

    A token's logit is found by comparing ids, so chips that each hold part of the vocabulary need no gather.
    """
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    found = torch.where(ids == tokens[..., None], logits, 0.0).sum(-1)
    return found - logits.exp().sum(-1).log()
