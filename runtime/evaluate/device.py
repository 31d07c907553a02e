"""A model's layers on a device, which give the outputs of one piece of text after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from converters.console.progress import progress
from converters.model.config import ModelConfig
from quantize.shards.chip_weights import ChipWeights
from quantize.shards.stored import stored_tensors
from runtime.devices.backend import Backend
from runtime.evaluate.graphs import outputs_graph
from runtime.evaluate.windows import Piece
from runtime.model.decoder import Head
from runtime.model.decoder_tensors import decoder_tensors, head_parameters
from runtime.model.graphs import CACHE_ARGUMENT
from runtime.run.load import load_head, load_tensors, make_cache, make_decoder


class Layers:
    """A decoder with the cache for one window."""

    def __init__(
        self,
        weights: ChipWeights,
        config: ModelConfig,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        window: int,
        backend: Backend,
        by_layer: bool,
    ) -> None:
        """Load ``weights`` up to the last layer of ``config``; ``dtype`` is that of activations."""
        self._backend = backend
        total = sum(stored.spec(config, backend.chips).nbytes for stored in stored_tensors(config, weights.scheme))
        with progress("Loading", total * backend.chips) as advance:
            tensors, _ = load_tensors(weights, config, backend, advance)
        self._decoder = make_decoder(config, dtype, backend, tensors)
        self._cache = make_cache(config, backend, 1, window, cache_dtype).layers
        self._first, self._later = (self._compiled(first, by_layer) for first in (True, False))

    @property
    def head(self) -> Head:
        """The model's own, to which an output may be given."""
        return self._decoder.head

    def outputs(self, piece: Piece) -> list[Any]:
        """On the device, float32 [1, T, E] each: the last layer's, or every layer's.

        A window's pieces must be given one after the other; its first one needs nothing of what is in the cache.
        """
        place = self._backend.replicate
        inputs = map(place, (piece.tokens, piece.slots, torch.zeros(1, dtype=torch.long)))
        found, self._cache = (self._later if piece.start else self._first)(*inputs, self._cache)
        return found

    def _compiled(self, first: bool, by_layer: bool) -> Callable[..., Any]:
        graph, dtype = outputs_graph(self._decoder, self._backend.cache_type, first, by_layer), self._decoder.dtype
        name = f"{'first' if first else 'later'} outputs in {dtype}"
        return self._backend.compile(graph, CACHE_ARGUMENT, exact=dtype == torch.float32, name=name)


def head_bytes(weights: ChipWeights, backend: Backend) -> int:
    """What ``reference_head`` takes on each chip."""
    config, scheme, chips = weights.config, weights.scheme, backend.chips
    tensors = decoder_tensors(head_parameters(config, scheme, chips, backend.fuse_bytes))
    return sum(tensor.nbytes(config, chips) for tensor in tensors)


def reference_head(weights: ChipWeights, dtype: torch.dtype, backend: Backend) -> Head:
    """The head of a model none of whose layers is loaded."""
    with progress("Loading", head_bytes(weights, backend) * backend.chips) as advance:
        return load_head(weights, dtype, backend, advance)


def fetched(results: Iterable[Sequence[Any]], backend: Backend) -> Iterator[list[Tensor]]:
    """Results on the host, each after the next one's launch, so that the device needn't wait for the host."""
    waiting: Sequence[Any] = ()
    for each in results:
        if waiting:
            yield [backend.fetch(tensor) for tensor in waiting]
        waiting = each
    if waiting:
        yield [backend.fetch(tensor) for tensor in waiting]
