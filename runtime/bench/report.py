"""Summarizing a bench's runs: medians with their spread, as JSON, CSV, Markdown and pictures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from converters.console.units import format_bytes, plural
from converters.files.whole import json_bytes, replace_file, to_utf8
from runtime.bench.baseline import INSTALL
from runtime.bench.points import FIGURES, Figure, Point, Row

FORMAT_VERSION = 1
REPORT_FILES = ("bench.json", "bench.csv", "bench.md", *(f"figure-{name}.png" for name in FIGURES))
_MEMORY = ("host_peak_rss_bytes",)
_MEASURED = ("per_token_latency_ms", "throughput_tokens_per_s", "prefill_ms", "load_s", "compile_s", *_MEMORY)
NOT_TPU = "Figures of a CPU are not TPU figures: its chips are virtual and it converts quantized weights at every step."


def summarize(
    figures: Sequence[Figure], runs: Sequence[dict[str, Any]], without: dict[Point, str], settings: dict[str, Any]
) -> dict[str, Any]:
    """The content of bench.json. ``runs`` are the journal's; ``without`` says why points can't be measured."""
    rows = {figure.name: [_summarize_row(row, runs, without) for row in figure.rows] for figure in figures}
    for figure in figures:
        for row, summary in zip(figure.rows, rows[figure.name], strict=True):
            summary["relative"] = _ratio(summary, rows[figure.name][row.reference])
    platforms = sorted({row["platform"] for summaries in rows.values() for row in summaries if row["platform"]})
    return {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "platforms": platforms,
        "cpu": any(name.startswith("cpu") for name in platforms),
        "figures": [
            {
                "figure": figure.name,
                "title": figure.title,
                "axis": figure.axis,
                "relative": figure.compared,
                "rows": rows[figure.name],
            }
            for figure in figures
        ],
    }


def _summarize_row(row: Row, runs: Sequence[dict[str, Any]], without: dict[Point, str]) -> dict[str, Any]:
    """A row's medians, with the smallest and largest value, over the runs that gave figures."""
    point = row.point.to_json()
    own = [run for run in runs if run["point"] == point]
    figures = [run["figures"] for run in own if "figures" in run]
    failed = bool(own) and "error" in own[-1]
    note = without.get(row.point)
    if note is None and failed:
        note = f"failed: {own[-1]['error']}"
    if note is None and not figures:
        note = "not measured yet"
    return {
        "label": row.label,
        "series": row.series,
        "x": row.x,
        **point,
        "platform": figures[-1].get("platform") if figures else None,
        "chips": figures[-1].get("chips") if figures else None,
        "steps": figures[-1].get("new_tokens") if figures else None,
        "runs": len(figures),
        "failed": failed,
        "note": note,
        **{key: spread(_values(figures, key, row)) for key in _MEASURED},
    }


def _values(figures: Sequence[dict[str, Any]], key: str, row: Row) -> list[float]:
    """A measured value from every run that has it; latency and throughput use the row's own metric."""
    if key in ("per_token_latency_ms", "throughput_tokens_per_s"):
        latencies = [run[row.metric] for run in figures if row.metric in run]
        return latencies if key == "per_token_latency_ms" else [1000 * row.point.batch_size / ms for ms in latencies]
    found = [(run.get("memory") or {}).get(key) if key in _MEMORY else run.get(key) for run in figures]
    return [value for value in found if value is not None]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, smallest and largest value; None without values."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _ratio(row: dict[str, Any], reference: dict[str, Any]) -> float | None:
    ours, theirs = row["per_token_latency_ms"], reference["per_token_latency_ms"]
    return ours["median"] / theirs["median"] if ours and theirs else None


def write_report(out: Path, report: dict[str, Any], figures: Sequence[Figure]) -> None:
    """Write bench.json, bench.csv, bench.md and, if matplotlib is installed, figure-N.png into ``out``."""
    replace_file(out / "bench.json", json_bytes(report, indent=1))
    replace_file(out / "bench.csv", to_utf8(to_csv(report)))
    replace_file(out / "bench.md", to_utf8(to_markdown(report)))
    if find_spec("matplotlib") is None:
        click.echo(f"No pictures: matplotlib is not installed. Install it and run the same again: {INSTALL}", err=True)
        return
    from runtime.bench.plot import draw

    for figure in report["figures"]:
        if any(row["runs"] for row in figure["rows"]):
            replace_file(out / f"figure-{figure['figure']}.png", draw(figure, report))


def to_csv(report: dict[str, Any]) -> str:
    """One line per row of every figure; measured columns end in _median, _min and _max."""
    lines = []
    for figure in report["figures"]:
        for row in figure["rows"]:
            line = {"figure": figure["figure"]} | {key: row[key] for key in row if key not in _MEASURED}
            for key in _MEASURED:
                line |= {f"{key}_{part}": (row[key] or {}).get(part) for part in ("median", "min", "max")}
            lines.append(line)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def to_markdown(report: dict[str, Any]) -> str:
    """bench.md: a table for each figure."""
    settings = report["settings"]
    others = (figure["rows"][0]["weights"] for figure in report["figures"] if figure["figure"] != "5")
    unnamed = next((f" Rows that name no format measure {weights} shards." for weights in others), "")
    lines = [
        f"# {settings['model']}, {plural(settings['layers'], 'layer')}",
        "",
        f"Devices and backends: {', '.join(report['platforms']) or 'none yet'}. torch {settings['torch']}, torch_xla "
        f"{settings['torch_xla']}, transformers {settings['transformers'] or 'not installed'}; "
        f"{settings['cpus']} CPU cores, {settings['machine']}.",
        *([NOT_TPU] if report["cpu"] else []),
        "",
        "Per-token latency is T/L, throughput B*L/T; prefill, loading and compiling are not part of it. Every run is a "
        f"process of its own and decodes up to {settings['max_new_tokens']} tokens. Medians, with the smallest and the "
        f"largest value in brackets.{unnamed}",
    ]
    for figure in report["figures"]:
        lines += ["", f"## {figure['title']}", "", *_table(figure)]
    return "\n".join(lines) + "\n"


def _table(figure: dict[str, Any]) -> list[str]:
    columns = (
        figure["axis"], "device/backend", "ms per token", figure["relative"], "tokens/s", "prefill, ms", "compile, s",
        "peak RSS", "runs",
    )  # fmt: skip
    lines = [_line(columns), "|" + "---|" * len(columns)]
    for row in figure["rows"]:
        if not row["runs"]:
            lines.append(_line((row["label"], row["note"], *[""] * (len(columns) - 2))))
            continue
        rss = row["host_peak_rss_bytes"]
        cells = (
            row["label"],
            f"{row['platform']}, {plural(row['chips'], 'chip')}",
            _shown(row["per_token_latency_ms"], 2),
            "" if row["relative"] is None else f"{row['relative']:.2f}",
            _shown(row["throughput_tokens_per_s"], 2),
            _shown(row["prefill_ms"], 1),
            _shown(row["compile_s"], 1),
            format_bytes(int(rss["median"])) if rss else "",
            str(row["runs"]) + (f" ({row['note']})" if row["note"] else ""),
        )
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _shown(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} - {value['max']:.{digits}f})"
