"""Perplexity of a model over tokens, and the divergence of its predictions from those of another model."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from runtime.devices.processes import guarded
from runtime.evaluate.graphs import Compared
from runtime.evaluate.passes import Job, Pass, model_pass, reference_pass
from runtime.evaluate.reference import Reference, open_reference
from runtime.evaluate.report import Evaluation
from runtime.evaluate.statistics import Positions
from runtime.evaluate.windows import pieces, predictions, windows
from runtime.model.linears.table import check_activations
from runtime.run.session import SessionOptions
from runtime.run.stored_model import StoredModel, open_model

_MOST_NATS = 700  # exp of more is no number of float64


def evaluate(
    shards: Path | str,
    tokens: Sequence[int],
    *,
    against: Path | str | None = None,
    window: int = 512,
    dtype: torch.dtype = torch.float32,
    kv_cache_dtype: torch.dtype | None = None,
    activations: str = "auto",
    backend: str = "xla",
    compile_cache: Path | str | None = None,
    layers: int | None = None,
    by_layer: bool = False,
) -> Evaluation | None:
    """Evaluate the shards in a directory over ``tokens``, ids of their vocabulary, in windows of ``window`` tokens.

    With ``against``, a directory of shards or any source of weights, the model is compared with that one. ``layers``
    cuts both after so many; ``kv_cache_dtype`` and ``activations`` are of the model alone. ``by_layer`` also compares
    both after every number of layers. The other arguments are those of ``open_session``.

    The result has the values of all n predicted positions (``positions``, in nats) and the figures made of them. None
    in those processes of a multi-host slice that write no output. Raises InputError for bad shards, options, tokens or
    devices, before any tensor is read.
    """
    model = open_model(Path(shards), 1, layers)
    cache = None if compile_cache is None else Path(compile_cache)
    options = SessionOptions(
        backend, dtype, kv_cache_dtype, activations, max_seq_len=window, layers=layers, compile_cache=cache
    )
    return evaluate_model(model, tokens, options, None if against is None else Path(against), by_layer)


def evaluate_model(
    model: StoredModel,
    tokens: Sequence[int],
    options: SessionOptions,
    against: Path | None = None,
    by_layer: bool = False,
) -> Evaluation | None:
    """``evaluate`` for a model that is opened; ``options.max_seq_len`` is the window."""
    tokens = _integers(tokens)
    check_activations(options.activations, model.shards.scheme.formats)
    _check_window(model.config, options.max_seq_len)
    _check_tokens(tokens, options.max_seq_len, model.config.vocab_size)
    if by_layer and against is None:
        raise InputError("--by-layer compares two models: give --against, or leave it out.")
    reference = None
    if against is not None:
        chips = model.shards.chips if options.backend == "xla" else None
        reference = open_reference(against, model, chips, options.layers)
        _check_reference(model, reference, options.max_seq_len, by_layer)
    job = Job(model, reference, tokens, options, by_layer)
    with guarded(), torch.no_grad():
        passes = [] if reference is None else [reference_pass(job)]
        passes.append(model_pass(job, passes[0].found if passes else None))
    return _evaluation(job, passes) if passes[-1].leader else None


def _integers(tokens: Sequence[int]) -> list[int]:
    try:
        return [index(token) for token in tokens]
    except TypeError:
        raise InputError("The tokens to evaluate over are no whole numbers; give their ids.") from None


def _check_window(config: ModelConfig, window: int) -> None:
    if window < 2:
        raise InputError("A window of 1 token predicts nothing; give --window 2 or more.")
    if not config.holds_context(window):
        most = config.max_position_embeddings
        raise InputError(f"{config.name} has learned {most} positions, and --window is {window}. Give {most} or less.")


def _check_tokens(tokens: Sequence[int], window: int, vocab_size: int) -> None:
    if predictions(len(tokens), window) < 1:
        raise InputError(
            f"The text holds {len(tokens)} of the 2 tokens that a prediction needs. Give a longer one: 8,192 tokens or "
            "more tell formats apart."
        )
    if any(not 0 <= token < vocab_size for token in tokens):
        raise InputError(f"A token id is outside the vocabulary; give 0 to {vocab_size - 1}.")


def _check_reference(model: StoredModel, reference: Reference, window: int, by_layer: bool) -> None:
    _check_window(reference.config, window)
    ours, theirs = model.config.num_layers, reference.config.num_layers
    if by_layer and ours != theirs:
        raise InputError(
            f"--by-layer compares layer by layer, and {model.path} has {ours} of them where --against has {theirs}. "
            f"Give --layers {min(ours, theirs)}, or leave it out."
        )


def _evaluation(job: Job, passes: Sequence[Pass]) -> Evaluation:
    last, model = passes[-1], job.model.shards.manifest
    lengths = [piece.length for piece in pieces(job.tokens, job.window)]
    depths = [_values([each[depth] for each in last.found], lengths) for depth in range(len(last.found[0]))]
    _check_values(depths[-1])
    by_layer = [float(values[Compared._fields.index("kl")].mean()) for values in depths] if job.by_layer else None
    return Evaluation(
        model=model.model,
        weights=model.scheme.name,
        tokens=len(job.tokens),
        windows=len(windows(job.tokens, job.window)),
        window=job.window,
        positions=_positions(job, depths[-1]),
        against=None if job.reference is None else job.reference.name,
        against_weights=None if job.reference is None else job.reference.weights.scheme.name,
        by_layer=by_layer,
        dtype=str(job.options.dtype).removeprefix("torch."),
        kv_cache_dtype=str(job.options.cache_dtype).removeprefix("torch."),
        activations=job.options.activations,
        platform=last.platform,
        chips=job.model.shards.chips if job.options.backend == "xla" else 1,
        recompilations=sum(each.recompilations for each in passes),
        seconds=sum(each.seconds for each in passes),
    )


def _values(found: Sequence[Tensor], lengths: Sequence[int]) -> np.ndarray:
    """The values [fields, n] of all pieces [fields, 1, T] without their padding."""
    parts = [each[:, 0, :length] for each, length in zip(found, lengths, strict=True)]
    return torch.cat(parts, dim=1).double().numpy()


def _positions(job: Job, values: np.ndarray) -> Positions:
    place = np.concatenate([np.arange(1, len(each)) for each in windows(job.tokens, job.window)])
    return Positions(place, *values)


def _check_values(values: np.ndarray) -> None:
    """Raise InputError where no figures can be made of values [fields, n]."""
    bad = ~np.isfinite(values).all(axis=0)
    if bad.any():
        raise InputError(
            f"{int(bad.sum())} of {bad.size} predictions are no numbers (NaN or infinite): the weights, or --dtype "
            "and the like, are not fit for this text. Check the checkpoint with llama-convert, or give --dtype float32."
        )
    if max(-row.mean() for row in values[:2]) > _MOST_NATS:
        raise InputError(
            f"The text's tokens are predicted with a probability of less than exp(-{_MOST_NATS}) on average: it is no "
            "text of these models' vocabulary. Check --text and the checkpoint."
        )
