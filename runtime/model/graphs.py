"""The functions that a backend compiles, each of fixed shapes: what llama-run executes, and llama-plan compiles.

tokens are [B, T], slots [T], offsets [B] as in decoder.py. A backend knows tensors and lists of them, so a compiled
function takes the cache's tensors and gives them back updated, as the last of its results: it can write the new ones
over the old. The functions below see a cache; ``_graph`` alone makes one of the tensors.
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

Graph = Callable[..., tuple[Any, ...]]  # of tokens, slots, offsets, the cache's tensors, and what else it needs
MakeGraph = Callable[[Decoder, type[KVCache]], Graph]
CACHE_ARGUMENT = 3  # the place of the cache's tensors among the arguments of each

_SCORED_LOGITS = 1 << 24  # at once, of all rows: 64 MiB in float32


def _graph(compute: Callable[..., tuple[Tensor, ...]]) -> MakeGraph:
    """What compiles ``compute`` (of a decoder, tokens, slots, offsets, a cache, and more) for a decoder and a kind of
    cache.
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
    """A bucket: a prompt's first tokens into the cache's first slots. They look at nothing but each other."""
    decoder.fill(tokens, slots, offsets, cache, first=True)
    return ()


@_graph
def later_fill_graph(decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache) -> tuple[()]:
    """A later section of a long prompt, from any slot on; it looks at the whole cache."""
    decoder.fill(tokens, slots, offsets, cache)
    return ()


@_graph
def greedy_graph(
    decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache
) -> tuple[Tensor, Tensor]:
    """A decode step: from the last tokens [B, 1] and their slot [1] the most probable next ones and their slot."""
    logits = decoder(tokens, slots, offsets, cache)
    return logits.argmax(-1, keepdim=True), slots + 1


@_graph
def sampled_graph(
    decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache, controls: Controls
) -> tuple[Tensor, Tensor]:
    """A decode step whose next tokens are drawn as the controls say; a row's noise is that of its last token's slot."""
    logits = decoder(tokens, slots, offsets, cache)
    temperature, top_k, top_p, noise = controls
    return sample(logits, temperature, top_k, top_p, noise.index_select(0, slots)[0]), slots + 1


@_graph
def logits_graph(decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache) -> tuple[Tensor]:
    """A decode step that gives the logits [B, V] in place of the tokens."""
    return (decoder(tokens, slots, offsets, cache),)


@_graph
def score_graph(
    decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache, following: Tensor
) -> tuple[Tensor]:
    """``fill_graph``, and the log-probability [B, T] of each of the ``following`` tokens [B, T] behind its own."""
    return (_scores(decoder, decoder.fill(tokens, slots, offsets, cache, first=True), following),)


@_graph
def later_score_graph(
    decoder: Decoder, tokens: Tensor, slots: Tensor, offsets: Tensor, cache: KVCache, following: Tensor
) -> tuple[Tensor]:
    """``later_fill_graph``, and the log-probabilities as ``score_graph`` gives them."""
    return (_scores(decoder, decoder.fill(tokens, slots, offsets, cache), following),)


def _scores(decoder: Decoder, x: Tensor, following: Tensor) -> Tensor:
    """Log-probabilities [B, T], float32, of ``following`` [B, T] by the last layer's output x [B, T, E].

    The logits of some positions are made at a time: those of a whole section would be the largest tensor of all.
    """
    count = max(1, _SCORED_LOGITS // (len(x) * decoder.vocab_size))
    parts = zip(x.split(count, dim=1), following.split(count, dim=1), strict=True)
    scores = [_log_probabilities(decoder.head(part)[..., : decoder.vocab_size], tokens) for part, tokens in parts]
    return torch.cat(scores, dim=1)


def _log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-softmax, in float32, of logits [B, T, V] at ``tokens`` [B, T]: [B, T].

    A token's logit is found by comparing: chips that hold a part of the vocabulary each need gather nothing for it.
    """
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    found = torch.where(ids == tokens[..., None], logits, 0.0).sum(-1)
    return found - logits.exp().sum(-1).log()
