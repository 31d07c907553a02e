"""The parameter table: one row per parameter of a decoder of a given architecture.

Conversion, sharding, sizing and loading all derive from it. An axis is named by what it counts, so that its length
follows from the configuration and its split over chips from the kind of thing counted (whole heads, say).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import prod

from converters.console.errors import DuplicateTensor, MissingTensor, UnexpectedTensor
from converters.model.architecture import Architecture, Positions
from converters.model.config import ModelConfig


class Axis(Enum):
    """What a dimension of a parameter counts."""

    VOCAB = "vocab"
    WORD = "word"  # the width of the embedding and of the output head: HIDDEN, unless linears lead to and from it
    HIDDEN = "hidden"
    QUERY = "query"  # num_heads * head_dim
    KV = "kv"  # num_kv_heads * head_dim
    FFN = "ffn"
    POSITIONS = "positions"  # learned ones, and the rows before the first

    def length(self, config: ModelConfig) -> int:
        return {
            Axis.VOCAB: config.vocab_size,
            Axis.WORD: config.word_size,
            Axis.HIDDEN: config.hidden_size,
            Axis.QUERY: config.num_heads * config.head_dim,
            Axis.KV: config.num_kv_heads * config.head_dim,
            Axis.FFN: config.intermediate_size,
            Axis.POSITIONS: config.architecture.position_offset + config.max_position_embeddings,
        }[self]


@dataclass(frozen=True)
class Row:
    """One kind of parameter. ``shard`` is the axis that tensor parallelism splits; None is held whole by every chip."""

    name: str
    axes: tuple[Axis, ...]  # a linear's are [out, in]
    shard: int | None = None
    quantized: bool = False
    fill: float | None = None  # the value that random weights have there; None: each its own
    looked_up: bool = False  # only the rows of the tokens at hand are read, one per token

    @property
    def is_norm(self) -> bool:
        """Whether it belongs to a normalization: these are what random weights give a value that changes nothing."""
        return self.fill is not None

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a matrix product, and not of a norm or a table to look up in."""
        return len(self.axes) == 2 and not self.looked_up


# Around the blocks. All names but the output head's stand behind the architecture's prefix.
EMBEDDING = Row("embed_tokens.weight", (Axis.VOCAB, Axis.WORD), shard=0, looked_up=True)
POSITIONS = Row("embed_positions.weight", (Axis.POSITIONS, Axis.HIDDEN), looked_up=True)
PROJECT_IN = Row("project_in.weight", (Axis.HIDDEN, Axis.WORD))
PROJECT_OUT = Row("project_out.weight", (Axis.WORD, Axis.HIDDEN))
LM_HEAD = Row("lm_head.weight", (Axis.VOCAB, Axis.WORD), shard=0)


def _norm(architecture: Architecture, name: str) -> Iterator[Row]:
    for tensor, neutral in architecture.norm.value if architecture.norm_weights else ():
        yield Row(f"{name}.{tensor}", (Axis.HIDDEN,), fill=neutral)


# Column-parallel linears are split by output rows, row-parallel ones by input columns (Megatron-LM, Shoeybi 2019). So a
# bias is split where its linear's outputs are, and else added once, to the sum over the chips.
def _column_parallel(architecture: Architecture, name: str, axis: Axis) -> Iterator[Row]:
    yield Row(f"{name}.weight", (axis, Axis.HIDDEN), shard=0, quantized=True)
    if architecture.biases:
        yield Row(f"{name}.bias", (axis,), shard=0)


def _row_parallel(architecture: Architecture, name: str, axis: Axis) -> Iterator[Row]:
    yield Row(f"{name}.weight", (Axis.HIDDEN, axis), shard=1, quantized=True)
    if architecture.biases:
        yield Row(f"{name}.bias", (Axis.HIDDEN,))


def _block(architecture: Architecture) -> Iterator[Row]:
    yield from _norm(architecture, architecture.attention_norm)
    yield from _column_parallel(architecture, "self_attn.q_proj", Axis.QUERY)
    yield from _column_parallel(architecture, "self_attn.k_proj", Axis.KV)
    yield from _column_parallel(architecture, "self_attn.v_proj", Axis.KV)
    yield from _row_parallel(architecture, f"self_attn.{architecture.attention_out}", Axis.QUERY)
    yield from _norm(architecture, architecture.feed_forward_norm)
    for name in architecture.feed_forward_in:
        yield from _column_parallel(architecture, name, Axis.FFN)
    yield from _row_parallel(architecture, architecture.feed_forward_out, Axis.FFN)


def same_input(architecture: Architecture) -> tuple[tuple[str, ...], ...]:
    """The linears of a block that take the same input, by their names within the block."""
    return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), architecture.feed_forward_in


@dataclass(frozen=True)
class Table:
    """The rows of an architecture in the order in which files hold them; ``block`` comes once per layer."""

    before: tuple[Row, ...]
    block: tuple[Row, ...]
    after: tuple[Row, ...]


@lru_cache(maxsize=16)
def table(architecture: Architecture, projected: bool) -> Table:
    """All rows but the output head's; ``projected`` where the embedding is of another width than the layers."""
    learned = architecture.positions is Positions.LEARNED
    return Table(
        before=(EMBEDDING, *([POSITIONS] if learned else []), *([PROJECT_IN] if projected else [])),
        block=tuple(_block(architecture)),
        after=(
            *(_norm(architecture, architecture.final_norm) if architecture.final_norm else ()),
            *([PROJECT_OUT] if projected else []),
        ),
    )


@dataclass(frozen=True)
class Parameter:
    """A row of the table made concrete: the tensor's full name and its shape before any split."""

    name: str
    shape: tuple[int, ...]
    row: Row
    in_block: bool = False  # one of its like in every layer

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def prefix(self) -> str:
        """What stands before its row's name: of a layer's parameters the same, and that layer's alone."""
        return self.name.removesuffix(self.row.name)

    @property
    def width(self) -> int:
        """Elements in one row."""
        return self.elements // self.shape[0]


def parameters(config: ModelConfig) -> list[Parameter]:
    """Every parameter of the model, in the order in which files hold them."""
    return list(_parameters(config))


def _parameters(config: ModelConfig) -> Iterator[Parameter]:
    rows, prefix = table(config.architecture, config.word_embed_proj_dim is not None), config.architecture.prefix
    for row in rows.before:
        yield make_parameter(row, config, prefix)
    for layer in range(config.num_layers):
        for row in rows.block:
            yield make_parameter(row, config, f"{prefix}layers.{layer}.", in_block=True)
    for row in rows.after:
        yield make_parameter(row, config, prefix)
    if not config.tie_word_embeddings:
        yield make_parameter(LM_HEAD, config)


def make_parameter(row: Row, config: ModelConfig, prefix: str = "", in_block: bool = False) -> Parameter:
    """The parameter of ``row`` in a model, its name put behind ``prefix``."""
    return Parameter(prefix + row.name, tuple(axis.length(config) for axis in row.axes), row, in_block)


def is_known(name: str, architecture: Architecture) -> bool:
    """Whether ``name`` is that of a parameter that some model of a family has, of any number of layers.

    ``architecture`` is the family's own, which has every tensor that one of its variants may have.
    """
    return _known_names(architecture).fullmatch(name) is not None


@lru_cache
def _known_names(architecture: Architecture) -> re.Pattern[str]:
    rows, prefix = table(architecture, architecture.projects), re.escape(architecture.prefix)
    outside, inside = (
        "|".join(re.escape(row.name) for row in kind) for kind in ((*rows.before, *rows.after), rows.block)
    )
    return re.compile(rf"{re.escape(LM_HEAD.name)}|{prefix}({outside})|{prefix}layers\.\d+\.({inside})")


def check_names(config: ModelConfig, found: Iterable[str], where: str) -> None:
    """Hold the names that a source has against the table.

    Raises DuplicateTensor, UnexpectedTensor or MissingTensor, each naming the first such tensor and ``where``.
    """
    expected = {parameter.name for parameter in parameters(config)}
    seen: set[str] = set()
    for name in found:
        if name in seen:
            raise DuplicateTensor(f"{where} holds the tensor {name} twice.")
        if name not in expected:
            raise UnexpectedTensor(
                f"{where} holds the tensor {name}, which its configuration has no place for{_hint(name, config)}."
            )
        seen.add(name)
    for parameter in parameters(config):
        if parameter.name not in seen:
            raise MissingTensor(f"{where} lacks the tensor {parameter.name} that its configuration calls for.")


def _hint(name: str, config: ModelConfig) -> str:
    if name == LM_HEAD.name:
        return " (tie_word_embeddings is true)"
    return f" (it has {config.num_layers} layers)" if name.startswith(f"{config.architecture.prefix}layers.") else ""
