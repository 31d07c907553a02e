"""Drawing a bench's figures: medians, with error bars from the smallest to the largest value."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from converters.console.units import plural

_DPI = 150
_COLORS = {"int8": "#1f77b4", "bf16": "#ff7f0e", "transformers": "#7f7f7f"}
_DEFAULT_COLOR = "#1f77b4"
_LATENCY = "latency per token (ms)"
_NAMES = {"int8": "int8", "bf16": "bfloat16"}
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
    """One group per batch size, one bar per scheme; above each the ratio of its latency to bfloat16's."""
    axes = drawing.subplots()
    batches = sorted({row["x"] for row in rows})
    for place, weights in enumerate(("bf16", "int8")):
        own = [row for row in rows if row["weights"] == weights]
        if not own:
            continue
        medians, errors = _errors(own, "per_token_latency_ms")
        places = [batches.index(row["x"]) + 0.36 * (place - 0.5) for row in own]
        axes.bar(
            places, medians, 0.34, yerr=errors, capsize=4, color=_COLORS[weights], label=f"{_NAMES[weights]} weights"
        )
        for x, row in zip(places, own, strict=True):
            _write_above(axes, x, row["per_token_latency_ms"])
    axes.set_ylim(0, 1.25 * max(row["per_token_latency_ms"]["max"] for row in rows))
    for group, batch in enumerate(batches):
        speedup = _speedup([row for row in rows if row["x"] == batch])
        if speedup is not None:
            axes.text(group, axes.get_ylim()[1] * 0.95, f"int8: {speedup:.2f} times as fast", ha="center", fontsize=9)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel(_LATENCY)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.grid(axis="y", alpha=0.3)


def _speedup(rows: list[dict[str, Any]]) -> float | None:
    """How many times as fast as bfloat16 int8 is at one batch size; None where it wasn't measured."""
    by_weights = {row["weights"]: row for row in rows}
    relative = by_weights["int8"]["relative"] if "int8" in by_weights else None
    return None if relative is None else 1 / relative


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
