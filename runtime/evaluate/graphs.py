"""What an evaluation computes on the device: layers' outputs, and what two heads make of them.

Nothing as large as the vocabulary leaves a graph. Logits are computed for some positions at a time, and everything over
the vocabulary is a sum, a maximum or a comparison of ids, so that chips can each hold a part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.model.decoder import Decoder, Head
from runtime.model.kv_cache import KVCache, Layers

NOTHING_ARGUMENT = 0  # index of the empty list

_LOGITS = 1 << 23  # computed at once: 32 MiB in float32
_SERIES_BELOW = 0.5  # of |w| in excess


class Compared(NamedTuple):
    """What a comparison gives for every position, in this order, as one tensor [len(fields), B, T] of float32."""

    log_probability: Tensor  # of the token that follows, under the model: nats
    reference: Tensor  # the same under the reference
    kl: Tensor  # of the model from the reference, over the vocabulary: nats
    same_first: Tensor  # 1 where both have the same most probable token, else 0


def outputs_graph(decoder: Decoder, cache_type: type[KVCache], first: bool, by_layer: bool) -> Callable[..., Any]:
    """A function of tokens [B, T], slots [T], offsets [B] and the cache's tensors, which it returns updated as its last
    result. Its first is a list of float32 [B, T, E]: the last layer's output, or with ``by_layer`` every layer's.

    With ``first`` the slots are the cache's first T, and only those are attended to.
    """

    def outputs(tokens: Tensor, slots: Tensor, offsets: Tensor, layers: Layers) -> tuple[list[Tensor], Layers]:
        cache = cache_type(layers)
        if by_layer:
            found = decoder.fill_by_layer(tokens, slots, offsets, cache, first=first)
        else:
            found = [decoder.fill(tokens, slots, offsets, cache, first=first)]
        return found, cache.layers

    return outputs


def score_graph(head: Head) -> Callable[..., Any]:
    """A function of an empty list, a layer's output [B, T, E] and the tokens that follow [B, T]: these tokens'
    log-probabilities in nats, float32 [1, B, T]. The list is what it donates.
    """

    def score(nothing: list[Tensor], x: Tensor, following: Tensor) -> tuple[Tensor, list[Tensor]]:
        count = _at_once(len(x), head.vocab_size)
        parts = zip(x.split(count, dim=1), following.split(count, dim=1), strict=True)
        found = [_found(_log_softmax(head, part), tokens) for part, tokens in parts]
        return torch.cat(found, dim=1)[None], nothing

    return score


def compare_graph(head: Head, reference: Head) -> Callable[..., Any]:
    """A function of an empty list, as for ``score_graph``, a layer's output in the model and in the reference,
    [B, T, E] each, and the tokens that follow [B, T]: what ``Compared`` says.
    """

    def compare(
        nothing: list[Tensor], x: Tensor, reference_x: Tensor, following: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        count = _at_once(len(x), head.vocab_size)
        parts = zip(*(each.split(count, dim=1) for each in (x, reference_x, following)), strict=True)
        found = [
            _compared(_log_softmax(head, part), _log_softmax(reference, reference_part), tokens)
            for part, reference_part, tokens in parts
        ]
        return torch.cat(found, dim=2), nothing

    return compare


def _at_once(rows: int, vocab_size: int) -> int:
    return max(1, _LOGITS // (rows * vocab_size))


def _log_softmax(head: Head, x: Tensor) -> Tensor:
    """Log-probabilities, float32 [B, T, V], of all tokens after x [B, T, E]."""
    logits = head(x)[..., : head.vocab_size].float()
    logits = logits - logits.amax(-1, keepdim=True)
    return logits - logits.exp().sum(-1, keepdim=True).log()


def _found(values: Tensor, tokens: Tensor) -> Tensor:
    """Of values [B, T, V] those at ``tokens`` [B, T]: [B, T]."""
    ids = torch.arange(values.shape[-1], device=values.device)
    return torch.where(ids == tokens[..., None], values, 0.0).sum(-1)


def _compared(log_probabilities: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    same_first = (log_probabilities.argmax(-1) == reference.argmax(-1)).float()
    kl = excess(log_probabilities, reference).sum(-1)
    return torch.stack([_found(log_probabilities, tokens), _found(reference, tokens), kl, same_first])


def excess(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Terms that sum up to KL(p || q) over the vocabulary, none of them negative: p * (exp(w) - 1 - w), w = log(q / p).

    Since p and q both sum up to 1, that is the same as p * -w. But small divergences aren't lost in it as a difference
    of much larger terms of both signs, and what rounding does to all of a row's logarithms alike cancels. For small w
    the bracket is a difference too, so there it is summed up as its series, to w^7.
    """
    p, w = log_p.exp(), log_q - log_p
    series = 1.0 + w / 7
    for divisor in (6, 5, 4, 3):
        series = 1.0 + w / divisor * series
    return torch.where(w.abs() < _SERIES_BELOW, p * w * w / 2 * series, log_q.exp() - p - p * w)
