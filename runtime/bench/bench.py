"""One run of llama-bench: all points are measured in turns, as often as asked and as time allows, then reported."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from converters.console.errors import InputError
from converters.console.progress import spinner
from converters.console.units import format_seconds
from quantize.shards.reading import Shards
from runtime.bench.baseline import INSTALL
from runtime.bench.child import Runner
from runtime.bench.inputs import (
    BF16_FOLDER,
    CACHE_FOLDER,
    BenchRequest,
    arguments,
    check_out,
    environment,
    makes_bf16_shards,
    open_shards,
)
from runtime.bench.journal import FILE_NAME as JOURNAL
from runtime.bench.journal import RunJournal, open_journal
from runtime.bench.points import LATENCY, Figure, Point, plan_figures
from runtime.bench.report import REPORT_FILES, summarize, write_report


@dataclass(frozen=True)
class Done:
    """The report, how many runs are left to do because time was up, and how many rows failed."""

    report: dict[str, Any]
    left: int
    failed: int


def bench(request: BenchRequest) -> Done:
    """Measure what is not yet measured, write the report into ``out``, and return it.

    Raises InputError before anything is removed or measured if the shards, the sizes, the disk or the contents of
    ``out`` don't fit, and later if a rerun is on another device.
    """
    begin = time.monotonic()
    shards = open_shards(request)
    weights, *others = shards
    first = shards[weights]
    request.sizes.check(first.config.cut(request.layers).max_position_embeddings)
    figures = plan_figures(request.figures, request.sizes, weights, others)
    given = arguments(request, shards)
    check_out(request, shards)
    request.out.mkdir(parents=True, exist_ok=True)
    with open_journal(request.out / JOURNAL, given, request.force) as journal:
        without = _without_transformers(figures)
        points = [point for point in dict.fromkeys(p for f in figures for p in f.points) if point not in without]
        if makes_bf16_shards(request, shards) and _are_wanting("bf16", points, journal, request.repeat):
            _make_bf16_shards(first, request.layers, request.out / BF16_FOLDER, replace=not journal.runs)
        if not journal.runs:
            _clear(request.out)
            journal.begin()
        places = {"bf16": request.out / BF16_FOLDER} | {name: each.directory for name, each in shards.items()}
        runner = Runner(places, request.layers, request.out / CACHE_FOLDER)
        left = sweep(points, journal, runner.measure, request.repeat, begin + 60 * request.minutes)
        report = summarize(figures, journal.runs, without, given | environment())
        write_report(request.out, report, figures)
        return Done(report, left, sum(row["failed"] for figure in report["figures"] for row in figure["rows"]))


def sweep(
    points: list[Point],
    journal: RunJournal,
    measure: Callable[[Point], dict[str, Any]],
    repeat: int,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure every point ``repeat`` times, in turns, so that a temporary disturbance of the machine affects them all.

    Runs in the journal are not repeated, and a point that fails is not tried again. A run starts only if it is expected
    to end by ``deadline``. Returns how many runs were not started for that reason.
    """
    left, failed = 0, set()
    total, number = repeat * len(points), sum(min(repeat, len(journal.of(point.to_json()))) for point in points)
    for turn in range(repeat):
        for point in points:
            if point in failed or len(journal.of(point.to_json())) > turn:
                continue
            if clock() + _expected_s(point, journal) > deadline:
                left += 1
                continue
            number += 1
            with spinner(f"Run {number} of {total}: {point}"):
                run = measure(point)
            _check_device(run, journal)
            journal.append(run)
            if "error" in run:
                failed.add(point)
            click.echo(f"Run {number} of {total}: {point}: {_outcome(run)}", err=True)
    return left


def _expected_s(point: Point, journal: RunJournal) -> float:
    """The expected seconds of a run: those of the point's last run, else the median of its backend's runs so far."""
    own = journal.of(point.to_json())
    if own:
        return own[-1]["wall_s"]
    alike = [run["wall_s"] for run in journal.runs if run["point"].get("backend") == point.backend]
    return statistics.median(alike) if alike else 0.0


def _outcome(run: dict[str, Any]) -> str:
    took = format_seconds(run["wall_s"])
    return f"failed: {run['error']}" if "error" in run else f"{run['figures'][LATENCY]:.1f} ms per token ({took})"


def _check_device(run: dict[str, Any], journal: RunJournal) -> None:
    """Raise InputError where a point's runs come from different devices: a median over them would mean nothing."""
    for earlier in journal.of(run["point"])[:1] if "figures" in run else ():
        devices = [f"{r['figures'].get('platform')} with {r['figures'].get('chips')} chips" for r in (earlier, run)]
        if devices[0] != devices[1]:
            raise InputError(
                f"The bench was begun on {devices[0]} and this is {devices[1]}. Go on there, or give another --out."
            )


def _are_wanting(weights: str, points: list[Point], journal: RunJournal, repeat: int) -> bool:
    """Whether a point of these weights has runs left to do."""
    return any(len(journal.of(point.to_json())) < repeat for point in points if point.weights == weights)


def _make_bf16_shards(shards: Shards, layers: int | None, out: Path, replace: bool) -> None:
    """Dequantize ``shards`` for figure 5; ``replace`` allows replacing what an earlier bench made of others."""
    from quantize.dequantize import write_dequantized

    if write_dequantized(shards, layers, out, force=replace):
        click.echo(
            f"Wrote bfloat16 shards to {out}, dequantized from those in {shards.directory}: their values are not the "
            "original weights, which speed does not depend on. To measure others: --bf16-shards.",
            err=True,
        )


def _without_transformers(figures: list[Figure]) -> dict[Point, str]:
    """The points that can't be measured because transformers is missing, each with the reason."""
    if find_spec("transformers"):
        return {}
    reason = f"transformers is not installed: {INSTALL}"
    return {point: reason for figure in figures for point in figure.points if point.is_baseline}


def _clear(out: Path) -> None:
    """Remove an earlier report and its compiled graphs, so that every point's first run compiles."""
    for name in REPORT_FILES:
        with suppress(FileNotFoundError):
            (out / name).unlink()
    shutil.rmtree(out / CACHE_FOLDER, ignore_errors=True)
