"""Going over the text: once with the reference, to keep its outputs, and once with the model, to compare with them.

So one model's layers are in memory at a time. What is kept of the reference is its last layer's output, E numbers for a
token, where its predictions would be as many as the vocabulary has tokens. Its output head is loaded again beside the
model, and makes the predictions of those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from converters.console.errors import InputError
from converters.console.progress import counted, spinner
from converters.console.units import format_bytes
from converters.model.config import ModelConfig
from converters.output.preflight import available_memory
from quantize.shards.chip_weights import ChipWeights
from runtime.devices.backend import Backend
from runtime.evaluate.device import Layers, fetched, head_bytes, reference_head
from runtime.evaluate.graphs import NOTHING_ARGUMENT, compare_graph, score_graph
from runtime.evaluate.reference import Reference
from runtime.evaluate.windows import Piece, count_pieces, piece_size, pieces, warm_up_pieces
from runtime.run.preflight import Needs, check_memory
from runtime.run.session import SessionOptions, start_backend
from runtime.run.stored_model import StoredModel

_ADVICE = "Give --layers or a smaller --window, or shards of a smaller format or for more chips."

# Launches what a pass computes of a piece, given the reference's outputs of it; returns the results on the device.
Use = Callable[[Piece, list[Tensor]], Sequence[Any]]


@dataclass(frozen=True)
class Job:
    """What is to be evaluated; ``options.max_seq_len`` is the window."""

    model: StoredModel
    reference: Reference | None
    tokens: Sequence[int]
    options: SessionOptions
    by_layer: bool

    @property
    def window(self) -> int:
        return self.options.max_seq_len

    def facts(self) -> dict[str, object]:
        """All that graphs follow from, beside the package's source and the device, by name."""
        manifest, reference = self.model.shards.manifest, self.reference
        against = None if reference is None else (reference.config, reference.weights.scheme)
        options = replace(self.options, compile_cache=None)
        model = (self.model.config, manifest.chips, manifest.scheme)
        return {"model": model, "reference": against, "options": options, "by_layer": self.by_layer}


class Pass(NamedTuple):
    """How a pass went; ``found`` is what it gave."""

    found: list[list[Tensor]]
    platform: str
    leader: bool  # whether this process writes the output for all
    recompilations: int
    seconds: float


def reference_pass(job: Job) -> Pass:
    """The reference's outputs of every piece of the text, on the host: the last layer's, or every layer's, float32
    [1, T, E]. Its activations and its cache are in ``options.dtype``, whatever the model's are.
    """
    reference = job.reference
    _check_room(job)
    options = replace(job.options, activations="auto", kv_cache_dtype=None)
    with _device(job, options, "reference", reference.weights) as backend:
        layers = _layers(job, reference.weights, reference.config, options, backend)
        return _over_text(job, backend, "Reference", lambda piece, _: layers.outputs(piece))


def model_pass(job: Job, outputs: list[list[Tensor]] | None) -> Pass:
    """For every piece of the text, what ``Compared`` says of the last layer's output, or of every layer's: float32
    [fields, 1, T]. Without the reference's ``outputs``, the first field alone.
    """
    model, options = job.model, job.options
    with _device(job, options, "model", model.shards) as backend:
        head = None if job.reference is None else job.reference.head(options.activations == "int8")
        more = 0 if head is None else head_bytes(head, backend)
        layers = _layers(job, model.shards, model.config, options, backend, more)
        use = _scored(layers, options, backend) if outputs is None else _compared(job, layers, head, backend)
        return _over_text(job, backend, "Evaluating", use, outputs)


def _scored(layers: Layers, options: SessionOptions, backend: Backend) -> Use:
    score = _compiled(score_graph(layers.head), options, backend)

    def use(piece: Piece, _: list[Tensor]) -> list[Any]:
        following = backend.replicate(piece.following)
        return [score([], x, following)[0] for x in layers.outputs(piece)]

    return use


def _compared(job: Job, layers: Layers, weights: ChipWeights, backend: Backend) -> Use:
    """``weights`` are the reference's, for its head."""
    head = reference_head(weights, job.options.dtype, backend)
    compare = _compiled(compare_graph(layers.head, head), job.options, backend)

    def use(piece: Piece, kept: list[Tensor]) -> list[Any]:
        following = backend.replicate(piece.following)
        pairs = zip(layers.outputs(piece), kept, strict=True)
        return [compare([], x, backend.replicate(theirs), following)[0] for x, theirs in pairs]

    return use


def _compiled(graph: Callable[..., Any], options: SessionOptions, backend: Backend) -> Callable[..., Any]:
    exact = options.dtype == torch.float32
    return backend.compile(graph, NOTHING_ARGUMENT, exact=exact, name=f"{graph.__name__} in {options.dtype}")


def _layers(
    job: Job,
    weights: ChipWeights,
    config: ModelConfig,
    options: SessionOptions,
    backend: Backend,
    more: int = 0,
) -> Layers:
    """A model's layers on the device, where they must have room beside ``more`` bytes on each chip."""
    needs = Needs.of(config, weights.scheme, backend.chips, 1, job.window, options.cache_dtype)
    check_memory(replace(needs, parameters=needs.parameters + more), backend, _ADVICE)
    return Layers(weights, config, options.dtype, options.cache_dtype, job.window, backend, job.by_layer)


@contextmanager
def _device(job: Job, options: SessionOptions, what: str, weights: ChipWeights) -> Iterator[Backend]:
    """The device with nothing on it, to which all processes have agreed; nothing is left on it afterwards."""
    facts = job.facts()
    backend = start_backend(job.model.shards.chips, options, repr((what, facts)))
    fault: Exception | None = None
    try:
        backend.check_files(weights)
    except (InputError, OSError) as error:
        fault = error
    of = job.model.shards.manifest.source_fingerprint
    backend.processes.agree(facts | {"source": of, "tokens": job.tokens}, fault)
    try:
        yield backend
        backend.wait()
    finally:
        backend.release()


def _over_text(job: Job, backend: Backend, label: str, use: Use, outputs: list[list[Tensor]] | None = None) -> Pass:
    """``use`` every piece of the text with the reference's outputs of it, compiled before by using padding."""
    with spinner("Compiling"):
        for piece in warm_up_pieces(job.window):
            use(piece, [torch.zeros_like(each) for each in outputs[0]] if outputs else [])
        backend.wait()
    backend.keep_recipes()
    before, begin = backend.compilations(), time.perf_counter()
    number = count_pieces(len(job.tokens), job.window)
    with counted(label, number) as advance:
        found = []
        launched = map(use, pieces(job.tokens, job.window), outputs or repeat([]))
        for each in fetched(launched, backend):
            found.append(each)
            advance(1)
    seconds = time.perf_counter() - begin
    return Pass(found, backend.platform, backend.leader, backend.compilations() - before, seconds)


def _check_room(job: Job) -> None:
    """Raise InputError where the reference's outputs have no room on this host."""
    config = job.reference.config
    kept = config.num_layers if job.by_layer else 1
    tokens = count_pieces(len(job.tokens), job.window) * piece_size(job.window)
    needed, free = 4 * tokens * config.hidden_size * kept, available_memory()
    if free is not None and needed > free:
        layers = f" of {kept} layers" if job.by_layer else ""
        raise InputError(
            f"The reference's outputs{layers} take {format_bytes(needed)} of this host's memory, where "
            f"{format_bytes(free)} are free. Give fewer --tokens{', or leave out --by-layer' if job.by_layer else ''}."
        )
