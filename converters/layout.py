"""The parameter table: one row per parameter of a LLaMA decoder.

Conversion, sharding, sizing and loading all derive from it. An axis is named by what it counts, so that its length
follows from the configuration and its split over chips from the kind of thing counted (whole heads, say).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from converters.config import ModelConfig
from converters.errors import DuplicateTensor, MissingTensor, UnexpectedTensor


class Axis(Enum):
    """What a dimension of a parameter counts."""

    VOCAB = "vocab"
    HIDDEN = "hidden"
    QUERY = "query"  # num_heads * head_dim
    KV = "kv"  # num_kv_heads * head_dim
    FFN = "ffn"
    ONE = "one"

    def length(self, config: ModelConfig) -> int:
        return {
            Axis.VOCAB: config.vocab_size,
            Axis.HIDDEN: config.hidden_size,
            Axis.QUERY: config.num_heads * config.head_dim,
            Axis.KV: config.num_kv_heads * config.head_dim,
            Axis.FFN: config.intermediate_size,
            Axis.ONE: 1,
        }[self]


@dataclass(frozen=True)
class Row:
    """One kind of parameter. ``shard`` is the axis that tensor parallelism splits; None is held whole by every chip."""

    name: str
    axes: tuple[Axis, ...]  # a linear's are [out, in]
    shard: int | None = None
    quantized: bool = False

    @property
    def is_norm(self) -> bool:
        return len(self.axes) == 1

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a matrix product, and not of a norm, a table to look up in, or a scale."""
        return len(self.axes) == 2 and Axis.ONE not in self.axes and self is not EMBEDDING

    def scale(self) -> Row:
        """The row of the per-output-channel scale [out, 1] that goes with this linear's int8 weight [out, in]."""
        return Row(self.name + "_scale", (self.axes[0], Axis.ONE), shard=0 if self.shard == 0 else None)


EMBEDDING = Row("model.embed_tokens.weight", (Axis.VOCAB, Axis.HIDDEN), shard=0)
# Column-parallel linears are split by output rows, row-parallel ones by input columns (Megatron-LM, Shoeybi 2019).
BLOCK = (
    Row("input_layernorm.weight", (Axis.HIDDEN,)),
    Row("self_attn.q_proj.weight", (Axis.QUERY, Axis.HIDDEN), shard=0, quantized=True),
    Row("self_attn.k_proj.weight", (Axis.KV, Axis.HIDDEN), shard=0, quantized=True),
    Row("self_attn.v_proj.weight", (Axis.KV, Axis.HIDDEN), shard=0, quantized=True),
    Row("self_attn.o_proj.weight", (Axis.HIDDEN, Axis.QUERY), shard=1, quantized=True),
    Row("post_attention_layernorm.weight", (Axis.HIDDEN,)),
    Row("mlp.gate_proj.weight", (Axis.FFN, Axis.HIDDEN), shard=0, quantized=True),
    Row("mlp.up_proj.weight", (Axis.FFN, Axis.HIDDEN), shard=0, quantized=True),
    Row("mlp.down_proj.weight", (Axis.HIDDEN, Axis.FFN), shard=1, quantized=True),
)
FINAL_NORM = Row("model.norm.weight", (Axis.HIDDEN,))
LM_HEAD = Row("lm_head.weight", (Axis.VOCAB, Axis.HIDDEN), shard=0)


_KNOWN_NAMES = re.compile(
    "|".join(re.escape(row.name) for row in (EMBEDDING, FINAL_NORM, LM_HEAD))
    + r"|model\.layers\.\d+\.("
    + "|".join(re.escape(row.name) for row in BLOCK)
    + ")"
)


@dataclass(frozen=True)
class Parameter:
    """A row of the table made concrete: the tensor's full name and its shape before any split."""

    name: str
    shape: tuple[int, ...]
    row: Row

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def width(self) -> int:
        """Elements in one row."""
        return self.elements // self.shape[0]


def parameters(config: ModelConfig) -> list[Parameter]:
    """Every parameter of the model, in the order in which files hold them."""
    return list(_parameters(config))


def _parameters(config: ModelConfig) -> Iterator[Parameter]:
    yield make_parameter(EMBEDDING, config)
    for layer in range(config.num_layers):
        for row in BLOCK:
            yield make_parameter(row, config, f"model.layers.{layer}.")
    yield make_parameter(FINAL_NORM, config)
    if not config.tie_word_embeddings:
        yield make_parameter(LM_HEAD, config)


def make_parameter(row: Row, config: ModelConfig, prefix: str = "") -> Parameter:
    """The parameter of ``row`` in a model, its name put behind ``prefix``."""
    return Parameter(prefix + row.name, tuple(axis.length(config) for axis in row.axes), row)


def is_known(name: str) -> bool:
    """Whether ``name`` is that of a parameter that some LLaMA has, of any number of layers."""
    return _KNOWN_NAMES.fullmatch(name) is not None


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
    return f" (it has {config.num_layers} layers)" if name.startswith("model.layers.") else ""
