"""Drawing a bench's figures: medians, with error bars from the smallest to the largest value."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from converters.console.units import plural
from quantize.formats.table import FORMATS

_DPI = 150
_COLORS = {"transformers": "#7f7f7f"}
_KIND_COLORS = {"bf16": "#ff7f0e", "fp8": "#2ca02c", "int8": "#1f77b4", "int4": "#d62728", "mixed": "#9467bd"}
_DEFAULT_COLOR = "#1f77b4"
_LATENCY = "latency per token (ms)"
_NAMES = {"bf16": "bfloat16"}  # of formats that are shown by another name than their own
# Above these ratios of largest to smallest, the axis of latencies, or of sizes, is logarithmic.
_SLOWEST_LINEAR, _WIDEST_LINEAR = 8, 20


def draw(figure: dict[str, Any], report: dict[str, Any]) -> bytes:
    """A figure of bench.json as PNG. At least one of its rows must have been measured."""
    rows = [row for row in figure["rows"] if row["per_token_latency_ms"]]
    makers = {"3": _batch_sizes, "5": _grouped_bars, "6": _prompt_lens}
    drawing = Figure(figsize=(8, 5), dpi=_DPI, layout="constrained")
    if figure["figure"] in makers:
        makers[figure["figure"]](drawing, figure, rows)
    elif all(row["x"] is not None for row in rows):
        _line(drawing.subplots(), figure, rows, "per_token_latency_ms", _LATENCY)
    else:
        _bars(drawing.subplots(), rows)
    drawing.suptitle(figure["title"], fontsize=13)
    drawing.supxlabel(_caption(rows, report), fontsize=8, color="#444444")
    file = io.BytesIO()
    drawing.savefig(file, format="png")
    return file.getvalue()


def _caption(rows: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """What was measured, on which device, and how often."""
    devices = dict.fromkeys(f"{row['platform']} ({plural(row['chips'], 'chip')})" for row in rows)
    counts = sorted({row["runs"] for row in rows})
    runs = plural(counts[-1], "run") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"
    fixed = [
        f"{name} {next(iter(values))}"
        for name, values in (
            ("batch", {row["batch_size"] for row in rows}),
            ("prompt", {row["prompt_len"] for row in rows}),
            ("max-seq-len", {row["max_seq_len"] for row in rows if row["max_seq_len"]}),
            ("weights", {row["weights"] for row in rows}),
        )
        if len(values) == 1
    ]
    text = (
        f"{report['settings']['model']} ({plural(report['settings']['layers'], 'layer')}), {', '.join(fixed)}. "
        f"Measured on {', '.join(devices)}. Median of {runs}; bars: smallest to largest."
    )
    if any(row["platform"].startswith("cpu") for row in rows):
        text += " CPU figures are not TPU figures."
    return "\n".join(textwrap.wrap(text, 120, break_on_hyphens=False))


def _errors(rows: list[dict[str, Any]], key: str) -> tuple[list[float], list[list[float]]]:
    """Medians, and the distances from them to the smallest and largest values, as matplotlib's errorbar takes them."""
    values = [row[key] for row in rows]
    medians = [value["median"] for value in values]
    return medians, [
        [value["median"] - value["min"] for value in values],
        [value["max"] - value["median"] for value in values],
    ]


def _line(axes: Axes, figure: dict[str, Any], rows: list[dict[str, Any]], key: str, label: str) -> None:
    """A measured value over the figure's axis, from zero."""
    medians, errors = _errors(rows, key)
    places = [row["x"] for row in rows]
    axes.errorbar(places, medians, yerr=errors, marker="o", capsize=4, color=_DEFAULT_COLOR)
    top = max(row[key]["max"] for row in rows)
    axes.set_ylim(0, 1.2 * top or 1)  # a prompt of one token has no prefill
    for x, row in zip(places, rows, strict=True):
        _write_above(axes, x, row[key])
    logarithmic = max(places) > _WIDEST_LINEAR * min(places)
    if logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(places, [str(x) for x in places])
    axes.margins(x=0.1)
    axes.set_xlabel(figure["axis"] + (", logarithmic" if logarithmic else ""))
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)


def _batch_sizes(drawing: Figure, figure: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    left, right = drawing.subplots(1, 2)
    _line(left, figure, rows, "per_token_latency_ms", _LATENCY)
    _line(right, figure, rows, "throughput_tokens_per_s", "throughput (tokens/s)")


def _prompt_lens(drawing: Figure, figure: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    left, right = drawing.subplots(1, 2)
    _line(left, figure, rows, "per_token_latency_ms", _LATENCY)
    _line(right, figure, rows, "prefill_ms", "prefill of the whole prompt (ms)")


def _grouped_bars(drawing: Figure, figure: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One group per batch size, one bar per format; above each group how many times as fast as bfloat16 they are."""
    axes = drawing.subplots()
    batches = sorted({row["x"] for row in rows})
    formats = list(dict.fromkeys(row["weights"] for row in figure["rows"]))
    colors, width = _format_colors(formats), 0.72 / len(formats)
    for place, weights in enumerate(formats):
        own = [row for row in rows if row["weights"] == weights]
        if not own:
            continue
        medians, errors = _errors(own, "per_token_latency_ms")
        places = [batches.index(row["x"]) + width * (place - (len(formats) - 1) / 2) for row in own]
        label = f"{_NAMES.get(weights, weights)} weights"
        axes.bar(places, medians, 0.94 * width, yerr=errors, capsize=4, color=colors[weights], label=label)
        for x, row in zip(places, own, strict=True):
            _write_above(axes, x, row["per_token_latency_ms"])
    texts = [_speedups([row for row in rows if row["x"] == batch]) for batch in batches]
    room = min(0.7, 0.1 + 0.045 * max(map(len, texts)))  # of the height, for these lines and a bar's own number
    axes.set_ylim(0, max(row["per_token_latency_ms"]["max"] for row in rows) / (1 - room))
    for group, lines in enumerate(texts):
        upright = axes.get_xaxis_transform()  # from 0 to 1 up the axes
        axes.text(group, 0.98, "\n".join(lines), transform=upright, ha="center", va="top", fontsize=9)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_xlim(-0.5, len(batches) - 0.5)  # also where bars are missing
    axes.set_ylabel(_LATENCY)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.grid(axis="y", alpha=0.3)


def _format_colors(formats: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Red, green and blue by the name of a format: its kind's colour, lighter for each further format of the kind."""
    kinds = [FORMATS[name].kind if name in FORMATS else name for name in formats]
    colors = {}
    for place, (name, kind) in enumerate(zip(formats, kinds, strict=True)):
        white = 0.8 * kinds[:place].count(kind) / kinds.count(kind)
        base = to_rgb(_KIND_COLORS.get(kind, _DEFAULT_COLOR))
        colors[name] = tuple(part + white * (1 - part) for part in base)
    return colors


def _speedups(rows: list[dict[str, Any]]) -> list[str]:
    """Lines that say how many times as fast as bfloat16 each format is; none where that wasn't measured."""
    ratios = [(row["weights"], row["relative"]) for row in rows if row["weights"] != "bf16" and row["relative"]]
    lines = [f"{name}: {1 / relative:.2f}" for name, relative in ratios]
    return ["times as fast as bfloat16", *lines] if lines else []


def _bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """One horizontal bar per row, so that long names can be read."""
    medians, errors = _errors(rows, "per_token_latency_ms")
    places = list(range(len(rows)))[::-1]
    colors = [_COLORS.get(row["series"], _DEFAULT_COLOR) for row in rows]
    axes.barh(places, medians, xerr=errors, capsize=4, color=colors, height=0.6)
    logarithmic = max(medians) > _SLOWEST_LINEAR * min(medians)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(medians) / 3, max(row["per_token_latency_ms"]["max"] for row in rows) * 5)
    else:
        axes.set_xlim(0, 1.25 * max(row["per_token_latency_ms"]["max"] for row in rows))
    for place, row in zip(places, rows, strict=True):
        axes.annotate(
            _number(row["per_token_latency_ms"]["median"]),
            (row["per_token_latency_ms"]["max"], place),
            textcoords="offset points",
            xytext=(8, 0),
            va="center",
            fontsize=9,
        )
    axes.set_yticks(places, [f"{_wrapped(row['label'])}\n({row['platform']})" for row in rows])
    axes.set_xlabel(_LATENCY + (", logarithmic" if logarithmic else ""))
    axes.grid(axis="x", alpha=0.3)


def _write_above(axes: Axes, x: float, value: dict[str, float]) -> None:
    """Write the median above its bar, on a background that keeps lines behind it away from the digits."""
    axes.annotate(
        _number(value["median"]),
        (x, value["max"]),
        textcoords="offset points",
        xytext=(0, 7),
        ha="center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
    )


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 26))


def _number(value: float) -> str:
    """Three significant digits, or all digits of a whole number that has more."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
