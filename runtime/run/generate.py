"""Prompts in, tokens out: prompts are written to the cache by buckets, then one compiled step gives each token.

A prompt's last token is left to the first decode step. So all tokens come from one graph, the buckets' graphs need no
output head, and generating L tokens takes L executions, as the post counts them.

The host is not in the loop: a step's tokens and slot stay on the device as the next step's inputs, and the host reads
tokens a few steps behind the last launch (``Backend.steps_ahead``). So up to that many steps are wasted after the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from converters.model.config import ModelConfig
from runtime.devices.backend import Backend
from runtime.model.decoder import Decoder
from runtime.model.graphs import (
    CACHE_ARGUMENT,
    Graph,
    MakeGraph,
    fill_graph,
    greedy_graph,
    later_fill_graph,
    later_score_graph,
    logits_graph,
    sampled_graph,
    score_graph,
)
from runtime.model.kv_cache import KVCache
from runtime.model.sampling import Controls, Sampling
from runtime.run.buckets import Section, has_later_sections, sections, usable_buckets

_PAD = 0  # any valid id: padding is masked


@dataclass(frozen=True)
class Generation:
    """The tokens generated from a batch of prompts, and the times in seconds."""

    token_ids: list[list[int]]  # of each row, the generated part including the end token
    steps: int  # decode steps executed: L
    decode_s: float  # T, from the launch of the first step until the last token is on the host
    prefill_s: float
    first_token_s: float  # from the start of the prefill until the first token is on the host
    prefill_executions: int


class _Sections(NamedTuple):
    """The graph for a prompt's first section, and that for its later ones."""

    first: Graph
    later: Graph


@dataclass
class _Decoding:
    """A batch's state: the next decode step's inputs on the device, and how many more steps the cache has room for."""

    tokens: Tensor  # [B, 1]
    slots: Tensor  # [1]
    offsets: Tensor  # [B]
    controls: Controls | None
    room: int


class Generator:
    """A decoder with its cache and compiled graphs, for batches with as many rows as the cache.

    The cache is never cleared: a batch's mask hides whatever the batch has not written. With ``sampled``, each batch
    says how the decode step chooses tokens, possibly greedily; without, the step is greedy and needs no sorting. Rows
    given to a method must have passed the checks of ``prompts.py`` for this cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        cache: KVCache,
        backend: Backend,
        buckets: Sequence[int],
        sampled: bool = False,
    ) -> None:
        self._config, self._backend = config, backend
        self.batch_size, self.max_seq_len = cache.batch_size, cache.slots
        self._buckets = usable_buckets(buckets, self.max_seq_len)
        self._layers = cache.layers
        self._sampled = sampled
        self._decoding: _Decoding | None = None

        def compiled(make: MakeGraph) -> Graph:
            graph, exact = make(decoder, backend.cache_type), decoder.dtype == torch.float32
            name = f"{graph.__name__} in {decoder.dtype}"
            return backend.compile(graph, donates=CACHE_ARGUMENT, exact=exact, name=name)

        self._fill = _Sections(compiled(fill_graph), compiled(later_fill_graph))
        self._score = _Sections(compiled(score_graph), compiled(later_score_graph))
        self._step, self._logits = compiled(sampled_graph if sampled else greedy_graph), compiled(logits_graph)

    def plan(self, length: int) -> list[Section]:
        """The executions that write a prompt of ``length`` tokens, except its last one, to the cache."""
        return sections(length - 1, self._buckets)

    def warm_up(self, longest_prompt: int | None = None) -> None:
        """Compile every bucket and the decode step by running them; after that, generating compiles nothing.

        With ``longest_prompt``, that holds only for prompts of up to that many tokens, which may need no later section.
        """
        self._warm_up_sections(self._fill, longest_prompt or self.max_seq_len)
        place = self._backend.replicate
        padding, first = torch.full((self.batch_size, 1), _PAD), torch.tensor([0])
        offsets, controls = torch.zeros(self.batch_size, dtype=torch.long), self._controls(Sampling())
        self._decoding = _Decoding(place(padding), place(first), place(offsets), controls, self.max_seq_len)
        for _ in range(min(2, self.max_seq_len)):  # the second takes the first one's outputs, as in decoding
            self.step()
        self._decoding = None
        self._backend.wait()

    def warm_up_scores(self, longest_row: int | None = None) -> None:
        """Compile the graphs of ``score``; after that, scoring rows of up to ``longest_row`` tokens compiles nothing.

        None allows for the longest rows that fit.
        """
        self._warm_up_sections(self._score, self.max_seq_len + 1 if longest_row is None else longest_row, copies=2)
        self._backend.wait()

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling | None = None
    ) -> Generation:
        """Continue a batch of prompts, greedily by default, each until its end token, ``max_new_tokens`` or the end of
        the cache.
        """
        controls = self._controls(sampling or Sampling())
        self._backend.wait()
        begin = time.perf_counter()
        decoding = self._begin(prompts, controls)
        self._backend.wait()
        filled = time.perf_counter()
        rows, first = self._decode(min(max_new_tokens, decoding.room))
        self._decoding = None
        done = time.perf_counter()
        return Generation(
            token_ids=[self._until_end([step[row] for step in rows]) for row in range(self.batch_size)],
            steps=len(rows),
            decode_s=done - filled,
            prefill_s=filled - begin,
            first_token_s=first - begin,
            prefill_executions=len(self.plan(max(map(len, prompts)))),
        )

    def prefill(self, prompts: Sequence[Sequence[int]], sampling: Sampling | None = None) -> None:
        """Write the prompts to the cache, except their last tokens, which are left to the first ``step``."""
        self._begin(prompts, self._controls(sampling or Sampling()))

    def step(self) -> Tensor:
        """Launch a decode step; returns the next tokens [B, 1] on the device. Raises ValueError without a prefilled
        batch or when the cache is full.
        """
        decoding = self._decoding
        if decoding is None:
            raise ValueError("a decode step continues prompts: give them to prefill first")
        if not decoding.room:
            raise ValueError(f"the cache's {self.max_seq_len} slots are full")
        controls = () if decoding.controls is None else (decoding.controls,)
        decoding.tokens, decoding.slots = self._run(
            self._step, decoding.tokens, decoding.slots, decoding.offsets, *controls
        )
        decoding.room -= 1
        return decoding.tokens

    def logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The logits [B, V], on the host, from which the first new tokens of these prompts would be chosen."""
        decoding = self._begin(prompts, None)
        self._decoding = None
        [logits] = self._run(self._logits, decoding.tokens, decoding.slots, decoding.offsets)
        return self._backend.fetch(logits)

    def score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities of every token except each row's first, given those before: float32 [B, T - 1] on the host.

        T is the length of the longest row. Rows are aligned at their ends; NaN stands where a shorter one has no token.
        """
        self._decoding = None
        tokens, offsets = _aligned(rows)  # [B, T]
        plan = self.plan(tokens.shape[1])
        found = [self._run_section(self._score, section, offsets, tokens[:, :-1], tokens[:, 1:]) for section in plan]
        fetch = self._backend.fetch
        parts = [fetch(scores)[:, : section.length] for section, [scores] in zip(plan, found, strict=True)]
        before_begin = torch.arange(tokens.shape[1] - 1) < offsets[:, None]
        return torch.cat(parts, dim=1).masked_fill(before_begin, float("nan"))

    def _begin(self, prompts: Sequence[Sequence[int]], controls: Controls | None) -> _Decoding:
        """Write the prompts to the cache, except their last tokens; returns the first decode step's inputs."""
        self._decoding = None  # an interrupted batch can't be continued: its cache is being overwritten
        place = self._backend.replicate
        rows, offsets = _aligned(prompts)
        length = rows.shape[1]
        for section in self.plan(length):
            self._run_section(self._fill, section, offsets, rows)
        last = torch.tensor([[prompt[-1]] for prompt in prompts])  # a slice of rows would have other strides
        room = self.max_seq_len - length + 1  # the last new token is never fed back
        self._decoding = _Decoding(place(last), place(torch.tensor([length - 1])), place(offsets), controls, room)
        return self._decoding

    def _decode(self, max_new_tokens: int) -> tuple[list[list[int]], float]:
        """Run up to ``max_new_tokens`` steps; returns tokens [L, B] and the clock's time when the first arrived.

        Tokens are read some steps behind the last launch, so that the device never waits for the host.
        """
        ahead = self._backend.steps_ahead
        launched: list[Tensor] = []
        rows: list[list[int]] = []
        open_rows = set(range(self.batch_size))
        first = 0.0
        while len(rows) < max_new_tokens:
            if open_rows and len(launched) < max_new_tokens:
                launched.append(self.step())
                if len(launched) - len(rows) <= ahead and len(launched) < max_new_tokens:
                    continue
            elif len(rows) == len(launched):
                break
            rows.append(self._backend.fetch(launched[len(rows)]).flatten().tolist())
            first = first or time.perf_counter()
            open_rows -= {row for row in open_rows if rows[-1][row] in self._config.eos_token_ids}
        return rows, first

    def _until_end(self, row: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(row) if token in self._config.eos_token_ids]
        return row[: ends[0] + 1] if ends else row

    def _controls(self, sampling: Sampling) -> Controls | None:
        """The controls of a sampled step on the device; None for a greedy one."""
        if self._sampled:
            return Controls(*map(self._backend.replicate, sampling.controls(self.batch_size, self.max_seq_len)))
        if not sampling.greedy:
            raise ValueError("a greedy generator can't sample; make it with sampled=True")
        return None

    def _warm_up_sections(self, graphs: _Sections, longest: int, copies: int = 1) -> None:
        """Run each bucket once on padding, and a later section if rows of ``longest`` tokens need one."""
        self._decoding = None
        offsets = torch.zeros(self.batch_size, dtype=torch.long)
        nothing = [torch.empty((self.batch_size, 0), dtype=torch.long)] * copies
        for bucket in self._buckets:
            self._run_section(graphs, Section(0, 0, bucket), offsets, *nothing)
        if has_later_sections(self._buckets, longest):
            self._run_section(graphs, Section(1, 0, self._buckets[-1]), offsets, *nothing)

    def _run_section(self, graphs: _Sections, section: Section, offsets: Tensor, *rows: Tensor) -> list[Tensor]:
        """Run a section on ``rows`` [B, T] padded to its bucket: the tokens, then any further inputs of the graphs."""
        slots = torch.arange(section.start, section.start + section.bucket)
        tokens, *more = (self._padded(each, section) for each in rows)
        placed = map(self._backend.replicate, (tokens, slots, offsets, *more))
        return self._run(graphs.later if section.start else graphs.first, *placed)

    def _padded(self, rows: Tensor, section: Section) -> Tensor:
        padded = torch.full((self.batch_size, section.bucket), _PAD)
        padded[:, : section.length] = rows[:, section.start : section.start + section.length]
        return padded

    def _run(self, graph: Graph, *inputs: Any) -> list[Tensor]:
        """Run a graph; returns its results without the cache's tensors, which replace the ones it was given."""
        *results, self._layers = graph(*inputs[:CACHE_ARGUMENT], self._layers, *inputs[CACHE_ARGUMENT:])
        return results


def _aligned(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of tokens padded in front so that they end together [B, T], and the slot [B] at which each starts."""
    length = max(map(len, rows))
    padded = torch.tensor([[_PAD] * (length - len(row)) + list(row) for row in rows])
    return padded, torch.tensor([length - len(row) for row in rows])
