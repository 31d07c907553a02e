"""The rows of a batch: made from what the command line asks for, and checked against the model and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from runtime.run.stored_model import StoredModel


@dataclass(frozen=True)
class PromptChoice:
    """Where prompts come from: texts, else ids, else ``drawn_len`` ids for each row, drawn with ``seed``."""

    texts: tuple[str, ...]
    ids: tuple[int, ...] | None
    drawn_len: int
    batch_size: int  # may also be 1 where several texts make the batch
    seed: int


def read_prompts(choice: PromptChoice, model: StoredModel, max_seq_len: int) -> list[list[int]]:
    """The token ids of every row. Raises InputError where the choice can't be fulfilled or ``check_prompts`` fails."""
    prompts = _chosen(choice, model, max_seq_len)
    check_prompts(model.config, prompts, max_seq_len)
    return prompts


def _chosen(choice: PromptChoice, model: StoredModel, max_seq_len: int) -> list[list[int]]:
    if choice.texts:
        if model.codec is None:
            raise InputError(f"{model.path} has no tokenizer.json to read --prompt with; give --prompt-ids.")
        prompts = [model.codec.encode(text) for text in choice.texts]
    elif choice.ids is not None:
        prompts = [list(choice.ids)]
    else:
        if choice.drawn_len > max_seq_len:
            raise InputError(
                f"The prompt would be {choice.drawn_len} tokens long and --max-seq-len is {max_seq_len}. "
                "Raise --max-seq-len, or lower --prompt-len."
            )
        generator = torch.Generator().manual_seed(choice.seed)
        shape = (choice.batch_size, choice.drawn_len)
        return torch.randint(model.config.vocab_size, shape, generator=generator).tolist()
    if len(prompts) > 1 and choice.batch_size not in (1, len(prompts)):
        raise InputError(f"--batch-size {choice.batch_size} contradicts {len(prompts)} prompts; leave it out.")
    return prompts if len(prompts) > 1 else prompts * choice.batch_size


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_seq_len: int) -> None:
    """Raise InputError for prompts that are empty, too long for ``max_seq_len`` or outside the vocabulary."""
    for prompt in prompts:
        if not prompt:
            raise InputError("A prompt without a token can't be continued; give at least one.")
        _check_ids(config, prompt)
        if len(prompt) > max_seq_len:
            raise InputError(
                f"The prompt is {len(prompt)} tokens long and --max-seq-len is {max_seq_len}. "
                "Raise --max-seq-len, or shorten the prompt."
            )


def check_scored(config: ModelConfig, rows: Sequence[Sequence[int]], max_seq_len: int) -> None:
    """Raise InputError for rows that can't be scored. A row may have ``max_seq_len`` + 1 tokens, because its last one
    takes no slot of the cache.
    """
    for row in rows:
        if len(row) < 2:
            raise InputError("A token is scored by those before it: give two tokens or more in every row.")
        _check_ids(config, row)
        if len(row) > max_seq_len + 1:
            raise InputError(
                f"A row to be scored is {len(row)} tokens long; it may have one more than the cache's {max_seq_len}. "
                "Raise max_seq_len, or score it in pieces."
            )


def _check_ids(config: ModelConfig, ids: Sequence[int]) -> None:
    rows = config.vocab_size
    beyond = [token for token in ids if not 0 <= token < rows]
    if beyond:
        raise InputError(f"Token id {beyond[0]} is outside the vocabulary of {rows}; give 0 to {rows - 1}.")
