"""What an evaluation has to find, from the logits of transformers' models, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, tokens: Sequence[int], window: int) -> np.ndarray:
    """Log-probabilities [n, V] at the n positions that windows of ``tokens`` predict, each window on its own."""
    parts = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    logits = [model(torch.tensor([part]), use_cache=False).logits[0, :-1].double().numpy() for part in parts]
    values = np.concatenate(logits)
    values -= values.max(axis=1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def followers(tokens: Sequence[int], window: int) -> np.ndarray:
    """The tokens [n] that are predicted."""
    return np.array([token for place, token in enumerate(tokens) if place % window])


def expected(model: PreTrainedModel, tokens: Sequence[int], window: int) -> tuple[float, float]:
    """Perplexity and its standard error."""
    found, right = log_probabilities(model, tokens, window), followers(tokens, window)
    surprise = -found[np.arange(len(right)), right]
    value = np.exp(surprise.mean())
    return value, value * surprise.std(ddof=1) / np.sqrt(len(surprise))


def expected_against(
    model: PreTrainedModel, reference: PreTrainedModel, tokens: Sequence[int], window: int
) -> dict[str, Any]:
    """The figures of llama-eval's ``against``, by its names."""
    q, p = (log_probabilities(each, tokens, window) for each in (model, reference))
    right = followers(tokens, window)
    rows = np.arange(len(right))
    ours, theirs = q[rows, right], p[rows, right]
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    ratio = np.exp((theirs - ours).mean())
    return {
        "perplexity": np.exp(-theirs.mean()),
        "ratio": ratio,
        "ratio_stderr": ratio * (theirs - ours).std(ddof=1) / np.sqrt(len(right)),
        "kl_mean": kl.mean(),
        "kl_stderr": kl.std(ddof=1) / np.sqrt(len(kl)),
        "kl_median": np.median(kl),
        "kl_p99": np.percentile(kl, 99),
        "kl_p999": np.percentile(kl, 99.9),
        "kl_max": kl.max(),
        "same_first": (q.argmax(axis=1) == p.argmax(axis=1)).mean(),
        "delta_p_rms": np.sqrt(((np.exp(ours) - np.exp(theirs)) ** 2).mean()),
    }
