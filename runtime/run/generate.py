"""Prompts in, tokens out: the prompt filled into the cache by buckets, then one compiled step per token.

The last token of a prompt is left to the first decode step. So all tokens come from one graph, the graphs of the
buckets need no output head, and generating L tokens is L executions, as the post counts them.

The host is not in the loop: a step's tokens and slot are the next one's inputs as they lie on the device, and the host
reads tokens only when it has launched a few steps more (``Backend.steps_ahead``). So many run in vain after the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from runtime.devices.backend import Backend
from runtime.model.decoder import Decoder
from runtime.model.graphs import (
    CACHE_ARGUMENT,
    fill_graph,
    greedy_graph,
    later_fill_graph,
    logits_graph,
    sampled_graph,
)
from runtime.model.kv_cache import KVCache
from runtime.model.sampling import Controls, Sampling
from runtime.run.buckets import Section, has_later_sections, sections, usable_buckets

_PAD = 0  # any valid id: what stands on padding is masked


@dataclass(frozen=True)
class Generation:
    """What came of a batch of prompts; times in seconds."""

    token_ids: list[list[int]]  # per row, the generated part, the end token included
    steps: int  # decode steps executed: L
    decode_s: float  # T, from the launch of the first step until the last token is on the host
    prefill_s: float
    first_token_s: float  # from the beginning of the prefill until the first token is on the host
    prefill_executions: int


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_seq_len: int) -> None:
    """Raise InputError for prompts that a cache of ``max_seq_len`` can't hold or that aren't of this vocabulary."""
    for prompt in prompts:
        if not prompt:
            raise InputError("A prompt without a token can't be continued; give at least one.")
        rows = config.vocab_size
        beyond = [token for token in prompt if not 0 <= token < rows]
        if beyond:
            raise InputError(f"Token id {beyond[0]} is outside the vocabulary of {rows}; give 0 to {rows - 1}.")
        if len(prompt) > max_seq_len:
            raise InputError(
                f"The prompt is {len(prompt)} tokens long and --max-seq-len is {max_seq_len}. "
                "Raise --max-seq-len, or shorten the prompt."
            )


class Generator:
    """A decoder with its cache and its compiled graphs, for batches of the cache's number of rows.

    The cache's content is never cleared: what a batch did not write itself, its mask hides. With ``sampled`` the decode
    step draws as each call of ``generate`` says, greedily too; without, it is greedy and spares the sorting.
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
        exact = decoder.dtype == torch.float32
        self._fill, self._fill_later, self._step, self._logits = (
            backend.compile(make(decoder, backend.cache_type), donates=CACHE_ARGUMENT, exact=exact)
            for make in (fill_graph, later_fill_graph, sampled_graph if sampled else greedy_graph, logits_graph)
        )

    def plan(self, length: int) -> list[Section]:
        """The executions that fill a prompt of ``length`` tokens, all but its last token, into the cache."""
        return sections(length - 1, self._buckets)

    def warm_up(self, longest_prompt: int | None = None) -> None:
        """Compile every bucket and the decode step, by running each once; nothing is compiled after that.

        With ``longest_prompt`` given, that holds for prompts of no more tokens: they may need no later sections.
        """
        offsets = torch.zeros(self.batch_size, dtype=torch.long)
        for bucket in self._buckets:
            self._run_fill(torch.full((self.batch_size, bucket), _PAD), 0, offsets)
        if has_later_sections(self._buckets, longest_prompt or self.max_seq_len):
            self._run_fill(torch.full((self.batch_size, self._buckets[-1]), _PAD), 1, offsets)
        tokens = self._backend.replicate(torch.full((self.batch_size, 1), _PAD))
        slots = self._backend.replicate(torch.tensor([0]))
        offsets, controls = self._backend.replicate(offsets), self._controls(Sampling())
        for _ in range(min(2, self.max_seq_len)):  # the second's inputs are the first one's outputs, as in decoding
            tokens, slots = self._run_step(tokens, slots, offsets, controls)
        self._backend.wait()

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling | None = None
    ) -> Generation:
        """Continue a batch of prompts, each until its end token or ``max_new_tokens``; greedily by default.

        The prompts must have passed ``check_prompts`` for this cache, and ``max_new_tokens`` must fit behind them.
        """
        sampling = sampling or Sampling()
        if not sampling.greedy and not self._sampled:
            raise ValueError("a greedy generator can't sample; make it with sampled=True")
        controls = self._controls(sampling)
        self._backend.wait()
        begin = time.perf_counter()
        last, slots, offsets = self._prefill(prompts)
        self._backend.wait()
        filled = time.perf_counter()
        rows, first = self._decode(last, slots, offsets, controls, max_new_tokens)
        done = time.perf_counter()
        return Generation(
            token_ids=[self._until_end([step[row] for step in rows]) for row in range(self.batch_size)],
            steps=len(rows),
            decode_s=done - filled,
            prefill_s=filled - begin,
            first_token_s=first - begin,
            prefill_executions=len(self.plan(max(map(len, prompts)))),
        )

    def logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The logits [B, V] that the first new tokens of these prompts are chosen by, on the host."""
        last, slots, offsets = self._prefill(prompts)
        logits, self._layers = self._logits(last, slots, offsets, self._layers)
        return logits.cpu()

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Fill the prompts into the cache, all but their last tokens; returns these [B, 1], their slot and offsets."""
        length = max(map(len, prompts))
        rows = torch.tensor([[_PAD] * (length - len(prompt)) + list(prompt) for prompt in prompts])  # [B, length]
        offsets = torch.tensor([length - len(prompt) for prompt in prompts])  # rows end at the same slot
        for start, count, bucket in self.plan(length):
            padded = torch.full((self.batch_size, bucket), _PAD)
            padded[:, :count] = rows[:, start : start + count]
            self._run_fill(padded, start, offsets)
        last = torch.tensor([[prompt[-1]] for prompt in prompts])  # a slice of rows would have other strides
        place = self._backend.replicate
        return place(last), place(torch.tensor([length - 1])), place(offsets)

    def _decode(
        self, tokens: Tensor, slots: Tensor, offsets: Tensor, controls: Controls | None, max_new_tokens: int
    ) -> tuple[list[list[int]], float]:
        """Up to ``max_new_tokens`` steps from the prompts' last tokens [B, 1]: tokens [L, B], and when the first came.

        Tokens are read some steps behind the last launch, so that the device never waits for the host.
        """
        ahead = self._backend.steps_ahead
        launched: list[Tensor] = []
        rows: list[list[int]] = []
        open_rows = set(range(self.batch_size))
        first = 0.0
        while len(rows) < max_new_tokens:
            if open_rows and len(launched) < max_new_tokens:
                tokens, slots = self._run_step(tokens, slots, offsets, controls)
                launched.append(tokens)
                if len(launched) - len(rows) <= ahead and len(launched) < max_new_tokens:
                    continue
            elif len(rows) == len(launched):
                break
            rows.append(launched[len(rows)].cpu().flatten().tolist())
            first = first or time.perf_counter()
            open_rows -= {row for row in open_rows if rows[-1][row] in self._config.eos_token_ids}
        return rows, first

    def _until_end(self, row: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(row) if token in self._config.eos_token_ids]
        return row[: ends[0] + 1] if ends else row

    def _controls(self, sampling: Sampling) -> Controls | None:
        """The device's tensors of a sampled step; a greedy one takes none."""
        if not self._sampled:
            return None
        return Controls(*map(self._backend.replicate, sampling.controls(self.batch_size, self.max_seq_len)))

    def _run_fill(self, tokens: Tensor, start: int, offsets: Tensor) -> None:
        slots = torch.arange(start, start + tokens.shape[1])
        inputs = [self._backend.replicate(tensor) for tensor in (tokens, slots, offsets)]
        self._layers = (self._fill_later if start else self._fill)(*inputs, self._layers)

    def _run_step(
        self, tokens: Tensor, slots: Tensor, offsets: Tensor, controls: Controls | None
    ) -> tuple[Tensor, Tensor]:
        inputs = (tokens, slots, offsets, self._layers)
        tokens, slots, self._layers = self._step(*inputs) if controls is None else self._step(*inputs, controls)
        return tokens, slots
