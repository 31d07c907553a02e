"""Prompts in, tokens out: the prompt filled into the cache by buckets, then one compiled step per token.

The last token of a prompt is left to the first decode step. So all tokens come from one graph, the graphs of the
buckets need no output head, and generating L tokens is L executions, as the post counts them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.config import ModelConfig
from converters.errors import InputError
from runtime.backend import Backend
from runtime.buckets import Section, sections, usable_buckets
from runtime.decoder import Decoder
from runtime.kv_cache import KVCache

Tensors = list[Tensor]
_PAD = 0  # any valid id: what stands on padding is masked


@dataclass(frozen=True)
class Generation:
    """What came of a batch of prompts; times in seconds."""

    token_ids: list[list[int]]  # per row, the generated part, the end token included
    steps: int  # decode steps executed: L
    decode_s: float  # T, the time of those steps
    prefill_s: float
    prefill_executions: int


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_seq_len: int) -> None:
    """Raise InputError for prompts that a cache of ``max_seq_len`` can't hold or that aren't of this vocabulary."""
    for prompt in prompts:
        if not prompt:
            raise InputError("A prompt without a token can't be continued; give at least one.")
        beyond = [token for token in prompt if not 0 <= token < config.vocab_size]
        if beyond:
            raise InputError(f"Token id {beyond[0]} is outside the vocabulary of {config.vocab_size}.")
        if len(prompt) > max_seq_len:
            raise InputError(
                f"The prompt is {len(prompt)} tokens long and --max-seq-len is {max_seq_len}. "
                "Raise --max-seq-len, or shorten the prompt."
            )


class Generator:
    """A decoder with its cache and its compiled graphs, for batches of ``batch_size`` rows.

    The cache's content is never cleared: what a batch did not write itself, its mask hides.
    """

    def __init__(
        self, config: ModelConfig, decoder: Decoder, cache: KVCache, backend: Backend, buckets: Sequence[int]
    ) -> None:
        self._config, self._decoder, self._backend = config, decoder, backend
        self.batch_size, self.max_seq_len = cache.keys[0].shape[0], cache.slots
        self._buckets = usable_buckets(buckets, self.max_seq_len)
        self._keys, self._values = cache.keys, cache.values
        self._fill = backend.compile(_fill_function(decoder, backend.cache_type))
        self._step = backend.compile(_step_function(decoder, backend.cache_type))
        self._logits = backend.compile(_logits_function(decoder, backend.cache_type))

    def plan(self, length: int) -> list[Section]:
        """The executions that fill a prompt of ``length`` tokens, all but its last token, into the cache."""
        return sections(length - 1, self._buckets, self.max_seq_len)

    def warm_up(self, lengths: Iterable[int]) -> None:
        """Compile, by running them once, the decode step and the buckets that prompts of these lengths take."""
        offsets = torch.zeros(self.batch_size, dtype=torch.long)
        for bucket in sorted({section.bucket for length in lengths for section in self.plan(length)}):
            self._run_fill(torch.full((self.batch_size, bucket), _PAD), 0, offsets)
        tokens = self._backend.replicate(torch.full((self.batch_size, 1), _PAD))
        slots = self._backend.replicate(torch.tensor([0]))
        placed = self._backend.replicate(offsets)
        for _ in range(2):  # the second step's inputs are the first one's outputs, as in decoding
            tokens, slots = self._run_step(tokens, slots, placed)
        self._backend.wait()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Generation:
        """Greedy decoding of ``batch_size`` prompts, each until its end token or ``max_new_tokens``.

        The prompts must have passed ``check_prompts`` for this cache.
        """
        self._backend.wait()
        begin = time.perf_counter()
        last, slots, offsets = self._prefill(prompts)
        self._backend.wait()
        filled = time.perf_counter()
        produced = self._decode(last, slots, offsets, max_new_tokens)
        done = time.perf_counter()
        token_ids = [self._until_end(row) for row in torch.cat(produced, dim=1).tolist()]
        executions = len(self.plan(max(map(len, prompts))))
        return Generation(token_ids, len(produced), done - filled, filled - begin, executions)

    def logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The logits [B, V] that the first new tokens of these prompts are chosen by, on the host."""
        last, slots, offsets = self._prefill(prompts)
        self._backend.donate(self._keys + self._values)
        logits, self._keys, self._values = self._logits(last, slots, offsets, self._keys, self._values)
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

    def _decode(self, tokens: Tensor, slots: Tensor, offsets: Tensor, max_new_tokens: int) -> list[Tensor]:
        """Up to ``max_new_tokens`` steps from the prompts' last tokens [B, 1]; the tokens of each step, on the host."""
        open_rows = set(range(self.batch_size))
        produced = []
        for _ in range(max_new_tokens):
            tokens, slots = self._run_step(tokens, slots, offsets)
            produced.append(tokens.cpu())
            open_rows -= {row for row in open_rows if produced[-1][row].item() in self._config.eos_token_ids}
            if not open_rows:
                break
        return produced

    def _until_end(self, row: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(row) if token in self._config.eos_token_ids]
        return row[: ends[0] + 1] if ends else row

    def _run_fill(self, tokens: Tensor, start: int, offsets: Tensor) -> None:
        # Every graph gets device tensors of its own: torch_xla bakes one that it has seen in an earlier graph into
        # the next as a constant.
        slots = torch.arange(start, start + tokens.shape[1])
        inputs = [self._backend.replicate(tensor) for tensor in (tokens, slots, offsets)]
        self._backend.donate(self._keys + self._values)
        self._keys, self._values = self._fill(*inputs, self._keys, self._values)

    def _run_step(self, tokens: Tensor, slots: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        self._backend.donate(self._keys + self._values)
        tokens, slots, self._keys, self._values = self._step(tokens, slots, offsets, self._keys, self._values)
        return tokens, slots


def _fill_function(decoder: Decoder, cache_type: type[KVCache]) -> Callable[..., tuple[Tensors, Tensors]]:
    """The graph of a bucket: tokens [B, T] into the cache."""

    def fill(tokens: Tensor, slots: Tensor, offsets: Tensor, keys: Tensors, values: Tensors) -> tuple[Tensors, Tensors]:
        cache = cache_type(keys, values)
        decoder.fill(tokens, slots, offsets, cache)
        return cache.keys, cache.values

    return fill


def _step_function(
    decoder: Decoder, cache_type: type[KVCache]
) -> Callable[..., tuple[Tensor, Tensor, Tensors, Tensors]]:
    """The graph of a decode step: the next tokens [B, 1] and their slot [1] from the last ones."""

    def step(
        tokens: Tensor, slots: Tensor, offsets: Tensor, keys: Tensors, values: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        cache = cache_type(keys, values)
        logits = decoder(tokens, slots, offsets, cache)
        return logits.argmax(-1, keepdim=True), slots + 1, cache.keys, cache.values

    return step


def _logits_function(decoder: Decoder, cache_type: type[KVCache]) -> Callable[..., tuple[Tensor, Tensors, Tensors]]:
    """The graph of a decode step that gives the logits [B, V] in place of the tokens."""

    def logits(
        tokens: Tensor, slots: Tensor, offsets: Tensor, keys: Tensors, values: Tensors
    ) -> tuple[Tensor, Tensors, Tensors]:
        cache = cache_type(keys, values)
        return decoder(tokens, slots, offsets, cache), cache.keys, cache.values

    return logits
