"""Tensors of a Hugging Face directory that its model doesn't need, and that are left out with a note.

These are buffers that follow from config.json, biases of zeros where the model has no biases, second copies of a
tensor, and an output head that is a copy of the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from converters.console.notes import note
from converters.console.units import plural
from converters.files.row_blocks import row_blocks
from converters.model.config import ModelConfig
from converters.model.dtypes import READ_DTYPES
from converters.model.parameters import EMBEDDING, LM_HEAD

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from converters.formats.tensor_files import TensorFile

_ROTARY = r"rotary_emb(edding)?\.(original_)?_?(inv_freq|(cos|sin|cos_sin)(_cached?)?|freqs(_cis)?|position_ids)"
_MASKS = r"(self_attn|attention|attn)\.(masked_)?bias|(attention_|causal_)?mask|position_ids|(attention_)?masked_bias"
_WITHIN = r"(self_attn|attention|attn|embed_positions)\."
# Buffers that trainers and older versions of transformers saved, for the model or for each layer.
_COMPUTED = re.compile(rf"(model\.)?(decoder\.)?(layers\.\d+\.)?(({_WITHIN})?({_ROTARY}|{_MASKS})|version)")
_BIAS, _WEIGHT = ".bias", ".weight"
_NAMED = 3  # how many tensors a note names


class Held(NamedTuple):
    """Where a tensor is stored: its file, and its name there."""

    file: TensorFile
    name: str

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.name)

    @property
    def dtype(self) -> str:
        return self.file.dtype(self.name)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.file.rows(self.name, start, stop)

    def columns(self, start: int, stop: int) -> torch.Tensor:
        return self.file.columns(self.name, start, stop)

    def whole(self) -> torch.Tensor:
        """All of a small tensor; of a single number, [1]."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the tensor, which must have an axis and not be empty."""
        return row_blocks(0, self.shape[0], prod(self.shape[1:]))

    @property
    def readable(self) -> bool:
        return self.dtype in (*READ_DTYPES, "int8") and bool(self.shape) and prod(self.shape) > 0


def is_computed(name: str) -> bool:
    """Whether a tensor of this name is a buffer that follows from config.json, not a weight."""
    return _COMPUTED.fullmatch(name) is not None


def biased_weight(name: str) -> str:
    """The name of the weight that a bias belongs to; empty where ``name`` is not a bias."""
    return name.removesuffix(_BIAS) + _WEIGHT if name.endswith(_BIAS) else ""


def note_left_out(names: list[str], what: str) -> None:
    """Note that these tensors are left out, if there are any; ``what`` says why."""
    if names:
        shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        note(f"{plural(len(names), 'tensor')} left out: {what} ({shown}).")


def is_zero(held: Held) -> bool:
    """Whether all values are zero; reads them block by block."""
    return held.readable and not any(held.rows(*block).any() for block in held.blocks())


def same_bytes(one: Held, other: Held) -> bool:
    """Whether two tensors are the same bit for bit; reads them block by block."""
    import torch

    return _alike(one, other) and all(
        torch.equal(*(held.rows(*block).contiguous().view(torch.uint8) for held in (one, other)))
        for block in one.blocks()
    )


def _same_values(one: Held, other: Held) -> bool:
    """Whether two tensors hold the same numbers, in any dtypes; reads them block by block."""
    import torch

    return (
        one.shape == other.shape
        and one.readable
        and other.readable
        and all(torch.equal(one.rows(*block).double(), other.rows(*block).double()) for block in one.blocks())
    )


def _alike(one: Held, other: Held) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.readable


def settle_head(config: ModelConfig, holder: dict[str, Held], quantized: bool = False) -> ModelConfig:
    """The configuration that fits the stored output head; a head equal to the embedding is removed from ``holder``.

    As in transformers 5: where config.json ties the head to the embedding but both are stored with different values,
    both count; where only the head is stored, it is the embedding too. A ``quantized`` head, which isn't in ``holder``,
    has values of its own.
    """
    embedding, head = config.architecture.prefix + EMBEDDING.name, LM_HEAD.name
    if not config.tie_word_embeddings or not (quantized or head in holder):
        return config
    if embedding not in holder and not quantized:
        holder[embedding] = holder.pop(head)
        note(f"{head} is stored without {embedding}: it is taken for both, which config.json ties.")
        return config
    if not quantized and _same_values(holder[embedding], holder[head]):
        del holder[head]
        return config
    note(
        f"config.json says tie_word_embeddings, but {head} is stored with values of its own: it is kept, as by "
        "transformers, and tie_word_embeddings is false."
    )
    return replace(config, tie_word_embeddings=False)
