"""A model opened once on its device, to generate tokens, logits, scores or single decode steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from converters.console.errors import InputError, shown
from converters.console.progress import progress, spinner
from converters.model.config import ModelConfig
from quantize.shards.stored import stored_tensors
from runtime.devices.backend import Backend
from runtime.devices.cluster import Cluster
from runtime.model.decoder_tensors import DecoderParameters
from runtime.model.linears.table import check_activations
from runtime.model.sampling import Sampling
from runtime.model.sizing import ACTIVATIONS
from runtime.run.buckets import DEFAULT_BUCKETS, are_buckets
from runtime.run.generate import Generation, Generator
from runtime.run.load import load_tensors, make_cache, make_decoder
from runtime.run.preflight import Needs, check_memory
from runtime.run.prompts import check_prompts, check_scored
from runtime.run.stored_model import StoredModel, open_model

BACKENDS = ("xla", "inductor", "eager")
_DTYPES = (torch.bfloat16, torch.float32)
_CACHE_DTYPES = (*_DTYPES, torch.int8)

_OWN_OPTIONS = ("compile_cache", "cluster")  # each of several processes has its own

Rows = Sequence[Sequence[int]] | Tensor  # token ids of each row, or [B, T]


@dataclass(frozen=True)
class SessionOptions:
    """How to run a model. Raises InputError for values with which no session can be opened."""

    backend: str = "xla"  # one of BACKENDS
    dtype: torch.dtype = torch.bfloat16  # of activations
    kv_cache_dtype: torch.dtype | None = None  # None: the same as the activations
    activations: str = "auto"  # one of ACTIVATIONS: int8 rounds them before the products with weights
    batch_size: int = 1  # rows of every batch
    max_seq_len: int = 256  # slots of the cache
    buckets: tuple[int, ...] = DEFAULT_BUCKETS  # prompt lengths to compile for
    layers: int | None = None  # run only this many, the first ones; None: all
    compile_cache: Path | None = None  # a folder that keeps compiled graphs
    sampled: bool = False  # whether tokens may be drawn
    cluster: Cluster | None = None  # this process among several; None: alone, or as a TPU slice's hosts are set up

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(f"backend {self.backend!r} is none; give one of {', '.join(BACKENDS)}.")
        for name, dtype, known in (("dtype", self.dtype, _DTYPES), ("kv_cache_dtype", self.cache_dtype, _CACHE_DTYPES)):
            if dtype not in known:
                raise InputError(f"{name} can't be {dtype}; give one of {', '.join(map(str, known))}.")
        if self.activations not in ACTIVATIONS:
            raise InputError(f"activations {self.activations!r} are none; give one of {', '.join(ACTIVATIONS)}.")
        for name, count in (("batch_size", self.batch_size), ("max_seq_len", self.max_seq_len)):
            if type(count) is not int or count < 1:
                raise InputError(f"{name} is {shown(count)}; give a whole number from 1 on.")
        if not are_buckets(self.buckets):
            raise InputError(f"buckets {self.buckets}: give ascending prompt lengths like {DEFAULT_BUCKETS}.")
        if self.compile_cache is not None and self.backend == "eager":
            raise InputError("The backend eager compiles nothing; leave out compile_cache.")
        if self.cluster is not None and self.backend != "xla":
            raise InputError(f"The backend {self.backend} runs in one process; leave out the cluster, or take xla.")

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.kv_cache_dtype or self.dtype


def open_session(
    path: Path | str,
    *,
    backend: str = "xla",
    dtype: torch.dtype = torch.bfloat16,
    kv_cache_dtype: torch.dtype | None = None,
    activations: str = "auto",
    batch_size: int = 1,
    max_seq_len: int = 256,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    layers: int | None = None,
    compile_cache: Path | str | None = None,
    sampled: bool = False,
    cluster: Cluster | None = None,
) -> Session:
    """Open the shards in ``path``, a directory that llama-quantize wrote. Use the session in ``with``, or close it.

    The other arguments are those of ``SessionOptions``, and llama-run's options of the same names. Raises InputError
    for bad shards, options or devices, and for missing chips' files, before any tensor is read.

    Of several processes each must use its session alike, method for method; what was given to them is compared.
    """
    cache = None if compile_cache is None else Path(compile_cache)
    options = SessionOptions(
        backend,
        dtype,
        kv_cache_dtype,
        activations,
        batch_size,
        max_seq_len,
        tuple(buckets),
        layers,
        cache,
        sampled,
        cluster,
    )
    return Session(open_model(Path(path), max_seq_len, layers), options)


class Session:
    """A model on its device: the weights, a decoder over them, and a cache for ``batch_size`` rows.

    Every method that takes rows of tokens expects ``batch_size`` of them, of any lengths that the cache holds, and
    raises InputError for others. A graph is compiled when it is first run, or before that by ``warm_up`` and
    ``warm_up_scores``.
    """

    def __init__(self, model: StoredModel, options: SessionOptions, plans: Mapping[str, object] | None = None) -> None:
        """Start the device and load ``model``, which must have been opened with the ``max_seq_len`` and ``layers`` of
        ``options``. ``plans`` is what several processes have to agree on besides, by name.

        Raises InputError where the device doesn't suit the shards, chips' files are missing, or processes disagree.
        """
        self.model, self.options = model, options
        check_activations(options.activations, model.shards.manifest.scheme.formats)
        self.backend = start_backend(model.shards.chips, options, _opened_for(model, options))
        _agree(model, options, self.backend, plans or {})
        sizes = (options.batch_size, options.max_seq_len, options.cache_dtype)
        check_memory(Needs.of(model.config, model.shards.manifest.scheme, self.backend.chips, *sizes), self.backend)
        begin = time.perf_counter()
        self.tensors, self.parameter_bytes_per_chip = _load(model, self.backend)
        with torch.no_grad():
            decoder = make_decoder(model.config, options.dtype, self.backend, self.tensors)
            cache = make_cache(model.config, self.backend, options.batch_size, options.max_seq_len, options.cache_dtype)
            self.backend.wait()
            loaded = time.perf_counter()
            self.load_s = loaded - begin
            # Only the generator keeps the cache, so that its first tensors are freed once a graph has overwritten them.
            self._generator: Generator | None = Generator(
                model.config, decoder, cache, self.backend, options.buckets, options.sampled
            )
        self.compile_s = time.perf_counter() - loaded  # the warm-ups add their time

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def generator(self) -> Generator:
        """The decoder with its cache and graphs. Raises ValueError when they have been released."""
        if self._generator is None:
            raise ValueError("this session has released its decoder; open another")
        return self._generator

    def _check_longest(self, tokens: int | None, most: int) -> None:
        if tokens is not None and not 1 <= tokens <= most:
            raise InputError(f"A row of {tokens} tokens can't be compiled for; give 1 to {most}, or None for any.")

    @torch.no_grad()
    def warm_up(self, longest_prompt: int | None = None) -> None:
        """Compile the graphs of ``generate``, ``prefill`` and ``step``, for prompts of up to ``longest_prompt`` tokens
        or, by default, of any length.
        """
        self._check_longest(longest_prompt, self.options.max_seq_len)
        self._agree(longest_prompt=longest_prompt)
        begin = time.perf_counter()
        with spinner("Compiling"):
            self.generator.warm_up(longest_prompt)
        self.backend.keep_recipes()
        self.compile_s += time.perf_counter() - begin

    @torch.no_grad()
    def warm_up_scores(self, longest_row: int | None = None) -> None:
        """Compile the graphs of ``score``, for rows of up to ``longest_row`` tokens or, by default, of any length."""
        self._check_longest(longest_row, self.options.max_seq_len + 1)
        self._agree(longest_row=longest_row)
        begin = time.perf_counter()
        with spinner("Compiling"):
            self.generator.warm_up_scores(longest_row)
        self.backend.keep_recipes()
        self.compile_s += time.perf_counter() - begin

    @torch.no_grad()
    def generate(self, prompts: Rows, max_new_tokens: int, sampling: Sampling | None = None) -> Generation:
        """Continue every prompt, greedily by default, until its end token, ``max_new_tokens`` or the end of the cache.

        Raises ValueError for ``sampling`` with a temperature in a session that was opened without ``sampled``.
        """
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {shown(max_new_tokens)}; give a whole number from 1 on.")
        rows = self._prompts(prompts)
        self._agree(prompts=rows, max_new_tokens=max_new_tokens, sampling=sampling)
        generation = self.generator.generate(rows, max_new_tokens, sampling)
        self._agree(generated_tokens=generation.token_ids)  # unlike processors may round differently
        return generation

    @torch.no_grad()
    def logits(self, prompts: Rows) -> Tensor:
        """Logits [B, V] after the last token of every prompt, in the activations' dtype, on the host."""
        rows = self._prompts(prompts)
        self._agree(prompts=rows)
        return self.generator.logits(rows)

    @torch.no_grad()
    def prefill(self, prompts: Rows, sampling: Sampling | None = None) -> None:
        """Start a batch for ``step`` to continue, by writing the prompts to the cache; ``sampling`` as in
        ``generate``.
        """
        rows = self._prompts(prompts)
        self._agree(prompts=rows, sampling=sampling)
        self.generator.prefill(rows, sampling)

    @torch.no_grad()
    def step(self) -> Tensor:
        """The next token [B] of every row of the batch that ``prefill`` started, on the host.

        It doesn't stop at end tokens. Raises ValueError without a started batch, after another use of the session since
        then, and when the cache is full.
        """
        return self.backend.fetch(self.generator.step()).flatten().clone()  # on the host it is the next step's input

    @torch.no_grad()
    def score(self, tokens: Rows) -> Tensor:
        """The log-probability of every token given those before it: float32 [B, T - 1] on the host.

        The softmax is computed on the device in float32, from logits in the activations' dtype. Rows may be one token
        longer than the cache. Rows of different lengths are aligned at their ends; the places before a shorter row's
        second token are NaN.
        """
        rows = self._rows(tokens)
        check_scored(self.config, rows, self.options.max_seq_len)
        self._agree(tokens=rows)
        return self.generator.score(rows)

    def release(self) -> None:
        """Free the decoder, its graphs and its cache. The weights stay on the device."""
        self._generator = None
        self.backend.wait()  # it may keep what the last graph gave until then

    def close(self) -> None:
        """Free the weights as well."""
        self.release()
        self.tensors = {}
        self.backend.release()

    def _agree(self, **facts: object) -> None:
        """Raise InputError, in all of several processes, where they were not given the same."""
        self.backend.processes.agree(facts)

    def _prompts(self, prompts: Rows) -> Sequence[Sequence[int]]:
        rows = self._rows(prompts)
        check_prompts(self.config, rows, self.options.max_seq_len)
        return rows

    def _rows(self, rows: Rows) -> Sequence[Sequence[int]]:
        if len(rows) != self.options.batch_size:
            raise InputError(
                f"The session is for {self.options.batch_size} rows and was given {len(rows)}. Give as many, or open "
                f"one with batch_size={len(rows)}."
            )
        found = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
        for row in found:
            if not isinstance(row, list | tuple) or any(type(token) is not int for token in row):
                raise InputError(f"A row is {shown(row)}; give a list of whole numbers for each, the token ids.")
        return found


def start_backend(chips: int, options: SessionOptions, opened_for: str) -> Backend:
    """The device for models on ``chips`` chips; ``opened_for`` is all that graphs follow from, beside the package's
    source and the device.
    """
    if options.backend == "xla":
        from runtime.devices.xla import XLABackend

        return XLABackend(chips, options.compile_cache, options.cluster, opened_for, options.activations == "int8")
    from runtime.devices.host import HostBackend

    return HostBackend(options.backend, options.compile_cache, options.activations == "int8")


def _agree(model: StoredModel, options: SessionOptions, backend: Backend, plans: Mapping[str, object]) -> None:
    """Check this process's files, and that all processes have theirs and are to run the same."""
    manifest = model.shards.manifest
    facts: dict[str, object] = {
        "model": (model.config, manifest.chips, manifest.scheme, manifest.source_fingerprint),
        **_shared(options),
    }
    fault: Exception | None = None
    try:
        backend.check_files(model.shards)
    except (InputError, OSError) as error:
        fault = error
    backend.processes.agree(facts | plans, fault)


def _opened_for(model: StoredModel, options: SessionOptions) -> str:
    """All that the session's graphs follow from, beside the package's source and the device."""
    manifest = model.shards.manifest
    return repr((model.config, manifest.chips, manifest.scheme, _shared(options)))


def _shared(options: SessionOptions) -> dict[str, object]:
    """Those that all of several processes are given alike, by name."""
    return {field.name: getattr(options, field.name) for field in fields(options) if field.name not in _OWN_OPTIONS}


def _load(model: StoredModel, backend: Backend) -> tuple[DecoderParameters, int]:
    """The decoder's tensors, and the bytes of parameters that each chip holds."""
    config, scheme = model.config, model.shards.manifest.scheme
    total = sum(stored.spec(config, backend.chips).nbytes for stored in stored_tensors(config, scheme))
    with torch.no_grad(), progress("Loading", total * backend.chips) as advance:
        return load_tensors(model.shards, config, backend, advance)
