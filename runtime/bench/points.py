"""What llama-bench measures: the rows of each of the post's figures, and the points behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from converters.console.errors import InputError
from runtime.run.buckets import sections, usable_buckets

PROMPT_LENS = (128, 10, 1500)  # defaults
MAX_SEQ_LENS = (256, 1024, 2048)
FIGURES = ("2", "3", "4", "5", "6", "baseline")
KINDS_IN_ORDER = ("bf16", "fp8", "int8", "int4")  # of figure 5's rows
POST_BUCKETS = (128, 256, 384, 512)
LAZY_TOKENS = 4  # each takes a compilation of the whole model
LATENCY, REPEATED_LATENCY = "per_token_latency_ms", "repeated_per_token_latency_ms"


@dataclass(frozen=True)
class Point:
    """One thing to measure, in a separate process. Lengths are in tokens.

    ``backend`` is one of llama-run's, or ``transformers-eager`` or ``transformers-lazy`` (baseline.py), which have no
    fixed cache length. ``weights`` is the name of the shards' format.
    """

    backend: str
    weights: str
    dtype: str
    batch_size: int
    prompt_len: int
    new_tokens: int
    max_seq_len: int | None

    @property
    def is_baseline(self) -> bool:
        return self.backend.startswith("transformers")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def buckets(self) -> tuple[int, ...]:
        """Those of the post's buckets that the prompt uses; no others need to be compiled."""
        usable = usable_buckets(POST_BUCKETS, self.max_seq_len)
        taken = {section.bucket for section in sections(self.prompt_len - 1, usable)}
        return tuple(sorted(taken)) or usable[:1]

    def __str__(self) -> str:
        cache = f", cache {self.max_seq_len}" if self.max_seq_len else ""
        return f"{self.backend} {self.weights}, {self.dtype}, batch {self.batch_size}, prompt {self.prompt_len}{cache}"


@dataclass(frozen=True)
class Row:
    """One row of a figure's table: a point, with its ``label`` and the ``series`` that gives its line or colour.

    ``x`` is its place on the axis (None: it is placed by its label). ``metric`` is the key of its latency in ms;
    ``reference`` is the index of the figure's row that it is compared with.
    """

    label: str
    series: str
    point: Point
    x: int | None = None
    metric: str = LATENCY
    reference: int = 0


@dataclass(frozen=True)
class Figure:
    """One figure: ``axis`` says what its rows differ in, ``compared`` what the column of ratios refers to."""

    name: str
    title: str
    axis: str
    rows: tuple[Row, ...]
    compared: str = "to the first row"

    @property
    def points(self) -> list[Point]:
        return list(dict.fromkeys(row.point for row in self.rows))


@dataclass(frozen=True)
class Sizes:
    """The values to sweep. The first of each list is used by figures that don't sweep it."""

    batch_sizes: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    max_seq_lens: tuple[int, ...]
    new_tokens: int

    def check(self, max_position_embeddings: int) -> None:
        """Raise InputError for lengths that the model's positions or the caches can't hold."""
        prompt, largest = self.prompt_lens[0], max(self.max_seq_lens)
        if largest > max_position_embeddings:
            raise InputError(
                f"--max-seq-len {largest} is beyond the model's {max_position_embeddings} positions. Give less."
            )
        for length, cache, hint in (
            *((prompt, cache, " (the first prompt length is used with every cache)") for cache in self.max_seq_lens),
            *((length, largest, "") for length in self.prompt_lens),
        ):
            needed = length + self.new_tokens - 1  # the last new token is never fed back
            if needed > cache:
                raise InputError(
                    f"A prompt of {length} and {self.new_tokens} new tokens need a cache of {needed}, and "
                    f"--max-seq-len has {cache}{hint}. Change --prompt-len, --max-new-tokens or --max-seq-len."
                )


def fitting_sizes(
    batch_sizes: tuple[int, ...],
    prompt_lens: tuple[int, ...] | None,
    max_seq_lens: tuple[int, ...] | None,
    new_tokens: int,
    max_position_embeddings: int,
) -> Sizes:
    """The sweeps, where None is replaced by the defaults that fit the model and each other. Sizes.check does the rest.

    Default caches are those that hold the first prompt. Default prompts are those that the longest cache holds,
    starting with one that every cache holds.
    """
    more = new_tokens - 1  # the last new token is never fed back
    first = (prompt_lens or PROMPT_LENS)[0]
    caches = (
        max_seq_lens
        or tuple(length for length in MAX_SEQ_LENS if first + more <= length <= max_position_embeddings)
        or (max_position_embeddings,)
    )
    if prompt_lens is None:
        everywhere = tuple(length for length in PROMPT_LENS if length + more <= min(caches)) or (1,)
        somewhere = (length for length in PROMPT_LENS if min(caches) < length + more <= max(caches))
        prompt_lens = (*everywhere, *somewhere)
    return Sizes(batch_sizes, prompt_lens, caches, new_tokens)


def plan_figures(names: tuple[str, ...], sizes: Sizes, weights: str, others: Iterable[str] = ()) -> list[Figure]:
    """The figures of these names, with the post's rows, for shards of the format ``weights``.

    Figure 5 compares this format and ``others`` with bfloat16.
    """
    fixed = Point(
        "xla", weights, "bfloat16", sizes.batch_sizes[0], sizes.prompt_lens[0], sizes.new_tokens, sizes.max_seq_lens[0]
    )
    makers = {
        "2": _backends,
        "3": _batch_sizes,
        "4": _max_seq_lens,
        "5": partial(_formats, formats=_in_order({"bf16", weights, *others})),
        "6": _prompt_lens,
        "baseline": _baseline,
    }
    return [makers[name](fixed, sizes) for name in names]


def _backends(fixed: Point, sizes: Sizes) -> Figure:
    rows = tuple(
        Row(label, label, replace(fixed, backend=backend))
        for label, backend in (("XLA", "xla"), ("Inductor", "inductor"), ("eager", "eager"))
    )
    return Figure("2", "Figure 2: the same decoder on each backend", "backend", rows)


def _batch_sizes(fixed: Point, sizes: Sizes) -> Figure:
    rows = tuple(
        Row(f"batch {batch}", fixed.weights, replace(fixed, batch_size=batch), batch)
        for batch in sorted(sizes.batch_sizes)
    )
    return Figure("3", "Figure 3: batch size", "batch size (rows)", rows)


def _max_seq_lens(fixed: Point, sizes: Sizes) -> Figure:
    rows = tuple(
        Row(f"max-seq-len {length}", fixed.weights, replace(fixed, max_seq_len=length), length)
        for length in sorted(sizes.max_seq_lens)
    )
    return Figure("4", "Figure 4: length of the KV cache", "max-seq-len (tokens)", rows)


def _in_order(formats: Iterable[str]) -> list[str]:
    """Names of formats by KINDS_IN_ORDER, other kinds at the end, and then a mixture; within a kind by the table."""
    from quantize.formats.table import FORMATS  # not before figures are planned: --help must answer at once

    kinds = list(dict.fromkeys((*KINDS_IN_ORDER, *(each.kind for each in FORMATS.values()))))
    names = list(FORMATS)
    places = {name: (kinds.index(each.kind), names.index(name)) for name, each in FORMATS.items()}
    return sorted(formats, key=lambda name: places.get(name, (len(kinds), 0)))


def _formats(fixed: Point, sizes: Sizes, formats: Sequence[str]) -> Figure:
    """The smallest and the largest batch in each of the ``formats``, of which bfloat16 is the first."""
    rows: list[Row] = []
    for batch in sorted({min(sizes.batch_sizes), max(sizes.batch_sizes)}):
        reference = len(rows)
        for weights in formats:
            point = replace(fixed, weights=weights, batch_size=batch)
            rows.append(Row(f"batch {batch}, {weights}", weights, point, batch, reference=reference))
    title = "Figure 5: formats of the weights"
    return Figure("5", title, "batch size (rows)", tuple(rows), "to bf16 of the same batch")


def _prompt_lens(fixed: Point, sizes: Sizes) -> Figure:
    cache = max(sizes.max_seq_lens)
    rows = tuple(
        Row(f"prompt {length}", fixed.weights, replace(fixed, prompt_len=length, max_seq_len=cache), length)
        for length in sorted(sizes.prompt_lens)
    )
    return Figure("6", f"Figure 6: prompt length, max-seq-len {cache}", "prompt length (tokens)", rows)


def _baseline(fixed: Point, sizes: Sizes) -> Figure:
    lazy = replace(fixed, backend="transformers-lazy", new_tokens=min(LAZY_TOKENS, fixed.new_tokens), max_seq_len=None)
    eager = replace(fixed, backend="transformers-eager", max_seq_len=None)
    ours, theirs = "this decoder", "transformers"
    rows = (
        Row("this decoder, XLA", ours, fixed),
        Row("transformers, LazyTensor", theirs, lazy),
        Row("transformers, LazyTensor, same lengths again", theirs, lazy, metric=REPEATED_LATENCY),
        Row("transformers, eager CPU, float32", theirs, replace(eager, dtype="float32")),
        Row("transformers, eager CPU, bfloat16", theirs, eager),
    )
    return Figure("baseline", "Baseline: transformers out of the box, the same weights", "implementation", rows)
