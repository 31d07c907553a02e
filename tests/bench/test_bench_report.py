"""The report of llama-bench: what JSON, CSV, tables and pictures say follows from the runs."""

from __future__ import annotations

import csv
import io
import itertools
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from runtime.bench import report as bench_report
from runtime.bench.points import FIGURES, Figure, Point, Sizes, fitting_sizes, plan_figures
from runtime.bench.report import spread, summarize, to_csv, to_markdown, write_report

SIZES = Sizes((1, 2, 8), (16, 4, 40), (64, 32, 128), 5)
SETTINGS = {
    "model": "small", "layers": 2, "torch": "2.9.0", "torch_xla": "2.9.0", "transformers": None, "cpus": 2,
    "machine": "x86_64", "max_new_tokens": 5,
}  # fmt: skip


def _runs(figures: list[Figure], count: int) -> list[dict[str, Any]]:
    """``count`` runs of every point, in turns, with random figures."""
    chance = random.Random(count)
    points = list(dict.fromkeys(point for figure in figures for point in figure.points))
    runs = []
    for point in points * count:
        value = {
            "per_token_latency_ms": chance.uniform(1, 100), "prefill_ms": chance.uniform(1, 9), "load_s": 0.5,
            "platform": "cpu/" + point.backend, "chips": 4, "new_tokens": 5,
            "memory": {"host_peak_rss_bytes": chance.randrange(10**9)},
        }  # fmt: skip
        if point.is_baseline:
            value["repeated_per_token_latency_ms"] = chance.uniform(1, 100)
        else:
            value["compile_s"] = chance.uniform(1, 50)
        runs.append({"point": point.to_json(), "wall_s": 1.0, "figures": value})
    return runs


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_medians_are_those_of_the_runs(count: int) -> None:
    """Every figure of every row against the runs of its point, picked out anew."""
    figures = plan_figures(FIGURES, SIZES, "int8")
    runs = _runs(figures, count)
    report = summarize(figures, runs, {}, SETTINGS)
    assert [figure["figure"] for figure in report["figures"]] == list(FIGURES)
    seen = 0
    for figure in report["figures"]:
        for row in figure["rows"]:
            own = [r["figures"] for r in runs if all(r["point"][key] == row[key] for key in r["point"])]
            key = "repeated_per_token_latency_ms" if "again" in row["label"] else "per_token_latency_ms"
            latencies = sorted(values[key] for values in own)
            assert row["runs"] == len(own) == count
            assert row["per_token_latency_ms"] == {
                "median": statistics.median(latencies), "min": latencies[0], "max": latencies[-1]
            }  # fmt: skip
            throughputs = [row["batch_size"] / (ms / 1000) for ms in latencies]
            assert row["throughput_tokens_per_s"]["median"] == pytest.approx(statistics.median(throughputs))
            peaks = [values["memory"]["host_peak_rss_bytes"] for values in own]
            assert row["host_peak_rss_bytes"]["median"] == statistics.median(peaks)
            assert (row["compile_s"] is None) == row["backend"].startswith("transformers")
            seen += 1
    assert seen == sum(len(figure.rows) for figure in figures)


def test_spread_of_nothing_is_nothing() -> None:
    assert spread([]) is None
    assert spread([3.0, 1.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_ratios_are_to_the_row_that_the_column_names() -> None:
    figures = plan_figures(("3", "5"), SIZES, "int8", ("int4-g32", "int4-g128", "fp8"))
    runs = _runs(figures, 3)
    batches, quantization = summarize(figures, runs, {}, SETTINGS)["figures"]
    median = {
        (row["weights"], row["batch_size"]): row["per_token_latency_ms"]["median"]
        for row in (*batches["rows"], *quantization["rows"])
    }
    for row in batches["rows"]:
        assert row["relative"] == pytest.approx(median["int8", row["batch_size"]] / median["int8", 1])
    assert [(row["weights"], row["batch_size"]) for row in quantization["rows"]] == [
        (weights, batch) for batch in (1, 8) for weights in ("bf16", "fp8", "int8", "int4-g128", "int4-g32")
    ]  # fmt: skip
    for row in quantization["rows"]:
        batch = row["batch_size"]
        assert row["relative"] == pytest.approx(median[row["weights"], batch] / median["bf16", batch])


def test_csv_and_tables_say_what_the_json_says() -> None:
    figures = plan_figures(FIGURES, SIZES, "int8")
    report = summarize(figures, _runs(figures, 3), {}, SETTINGS)
    rows = [(figure["figure"], row) for figure in report["figures"] for row in figure["rows"]]
    lines = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert len(lines) == len(rows)
    for line, (name, row) in zip(lines, rows, strict=True):
        assert (line["figure"], line["label"], line["batch_size"]) == (name, row["label"], str(row["batch_size"]))
        for part in ("median", "min", "max"):
            assert float(line[f"per_token_latency_ms_{part}"]) == row["per_token_latency_ms"][part]
        assert float(line["relative"]) == row["relative"]
        assert line["compile_s_median"] == ("" if row["compile_s"] is None else str(row["compile_s"]["median"]))
    markdown = to_markdown(report)
    table = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    cells = [line for line in table if line[1] != "device/backend"]
    assert [line[0] for line in cells] == [row["label"] for _, row in rows]
    for line, (_, row) in zip(cells, rows, strict=True):
        latency = row["per_token_latency_ms"]
        assert line[2] == f"{latency['median']:.2f} ({latency['min']:.2f} - {latency['max']:.2f})"
        assert line[3] == f"{row['relative']:.2f}"
    assert "CPU are not TPU figures" in markdown
    assert "Rows that name no format measure int8 shards." in markdown
    assert "|---" in markdown


def test_rows_without_runs_say_why() -> None:
    figures = plan_figures(("2", "baseline"), SIZES, "int8")
    runs = [run for run in _runs(figures, 1) if run["point"]["backend"] == "xla"]
    inductor = next(point for point in figures[0].points if point.backend == "inductor")
    runs.append({"point": inductor.to_json(), "wall_s": 1.0, "error": "no compiler"})
    without = {point: "install it" for point in figures[1].points if point.is_baseline}
    report = summarize(figures, runs, without, SETTINGS)
    notes = {(row["backend"], row["dtype"]): row["note"] for figure in report["figures"] for row in figure["rows"]}
    assert notes == {
        ("xla", "bfloat16"): None, ("inductor", "bfloat16"): "failed: no compiler",
        ("eager", "bfloat16"): "not measured yet", ("transformers-lazy", "bfloat16"): "install it",
        ("transformers-eager", "float32"): "install it", ("transformers-eager", "bfloat16"): "install it",
    }  # fmt: skip
    assert [row["failed"] for row in report["figures"][0]["rows"]] == [False, True, False]
    for text in (to_markdown(report), to_csv(report)):
        for note in ("failed: no compiler", "not measured yet", "install it"):
            assert note in text


def test_pictures_open_and_show_something(tmp_path: Path) -> None:
    """As matplotlib's own reader has them: large enough, not of one colour; rows that are missing are no error."""
    from matplotlib.image import imread

    figures = plan_figures(FIGURES, SIZES, "int8")
    runs = _runs(figures, 3)
    write_report(tmp_path, summarize(figures, runs[: len(runs) // 3], {}, SETTINGS), figures)
    bf16 = [run for run in runs if run["point"]["weights"] == "bf16"]
    (tmp_path / "half").mkdir()
    write_report(tmp_path / "half", summarize(figures, bf16, {}, SETTINGS), figures)
    assert [path.name for path in (tmp_path / "half").glob("*.png")] == ["figure-5.png"]
    for path in (*(tmp_path / f"figure-{name}.png" for name in FIGURES), tmp_path / "half" / "figure-5.png"):
        height, width, _ = imread(path).shape
        assert 500 <= height <= 1500
        assert 900 <= width <= 2000
        assert len({tuple(pixel) for pixel in imread(path)[::7, ::7, :3].reshape(-1, 3).tolist()}) > 3


def test_every_format_has_its_bars_and_says_how_fast_it_is() -> None:
    """In colours of its own, in the table's order; above a group where bfloat16 was measured."""
    from matplotlib.figure import Figure as Drawing

    from runtime.bench.plot import _grouped_bars

    names = ("bf16", "fp8", "int8", "int4", "int4-zp", "int4-g128", "mixed")
    figures = plan_figures(("5",), SIZES, "int8", names)
    runs = [run for run in _runs(figures, 3) if (run["point"]["weights"], run["point"]["batch_size"]) != ("bf16", 8)]
    [figure] = summarize(figures, runs, {}, SETTINGS)["figures"]
    rows, drawing = [row for row in figure["rows"] if row["runs"]], Drawing()
    _grouped_bars(drawing, figure, rows)
    [axes] = drawing.axes
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    assert [bar.get_label() for bar in bars] == [f"{name} weights" for name in ("bfloat16", *names[1:])]
    assert len({bar.patches[0].get_facecolor() for bar in bars}) == len(names)
    places = sorted(patch.get_x() for bar in bars for patch in bar.patches)
    assert min(b - a for a, b in itertools.pairwise(places)) > bars[0].patches[0].get_width()
    [ratios, nothing] = [text.get_text() for text in axes.texts if "\n" in text.get_text() or not text.get_text()]
    medians = {row["weights"]: row["per_token_latency_ms"]["median"] for row in rows if row["batch_size"] == 1}
    lines = [f"{name}: {medians['bf16'] / medians[name]:.2f}" for name in names[1:]]
    assert ratios.splitlines() == ["times as fast as bfloat16", *lines]
    assert nothing == ""


@pytest.mark.filterwarnings("error")
def test_a_prefill_of_no_time_is_drawn_without_a_warning(tmp_path: Path) -> None:
    figures = plan_figures(("6",), Sizes((1,), (1,), (32,), 5), "int8")
    runs = _runs(figures, 2)
    for run in runs:
        run["figures"]["prefill_ms"] = 0.0
    write_report(tmp_path, summarize(figures, runs, {}, SETTINGS), figures)
    assert (tmp_path / "figure-6.png").exists()


def test_without_matplotlib_the_tables_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_report, "find_spec", lambda name: None)
    figures = plan_figures(("3",), SIZES, "int8")
    write_report(tmp_path, summarize(figures, _runs(figures, 1), {}, SETTINGS), figures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.csv", "bench.json", "bench.md"]
    assert "matplotlib is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("cache", [7, 100, 128, 200, 256, 300, 512, 700, 2048])
def test_only_the_buckets_that_a_prompt_takes(cache: int) -> None:
    """The sections that the decoder cuts a prompt into are the same with these buckets as with all of the post's."""
    from runtime.run.buckets import sections, usable_buckets

    for length in range(1, cache + 1):
        chosen = Point("xla", "int8", "bfloat16", 1, length, 1, cache).buckets()
        every = sections(length - 1, usable_buckets((128, 256, 384, 512), cache))
        assert sections(length - 1, usable_buckets(chosen, cache)) == every
        assert set(chosen) == {section.bucket for section in every} or length == 1
        assert len(chosen) >= 1


@pytest.mark.parametrize(
    ("prompts", "caches", "new_tokens", "positions", "expected"),
    [
        (None, None, 16, 2048, ((128, 10, 1500), (256, 1024, 2048))),
        (None, None, 256, 2048, ((128, 10, 1500), (1024, 2048))),  # 128 + 255 are beyond 256
        (None, None, 16, 128, ((10,), (128,))),
        (None, None, 256, 256, ((1,), (256,))),
        (None, (64, 256), 16, 2048, ((10, 128), (64, 256))),
        (None, (2048,), 16, 2048, ((128, 10, 1500), (2048,))),
        (None, (8, 2048), 3, 2048, ((1, 128, 10, 1500), (8, 2048))),
        ((300, 10), None, 16, 2048, ((300, 10), (1024, 2048))),
        ((241, 10), None, 16, 2048, ((241, 10), (256, 1024, 2048))),
    ],
)
def test_defaults_fit_what_is_given(
    prompts: tuple[int, ...] | None, caches: tuple[int, ...] | None, new_tokens: int, positions: int, expected: object
) -> None:
    """They are never refused: a prompt and its new tokens, but for the last, fit where they are put."""
    sizes = fitting_sizes((1,), prompts, caches, new_tokens, positions)
    sizes.check(positions)
    assert (sizes.prompt_lens, sizes.max_seq_lens) == expected


@pytest.mark.parametrize("new_tokens", [1, 3, 16, 100, 247, 256, 1000, 2048])
def test_defaults_alone_are_never_refused(new_tokens: int) -> None:
    for positions in range(new_tokens, 4096, 61):
        fitting_sizes((1,), None, None, new_tokens, positions).check(positions)


def test_each_figure_varies_what_it_is_about() -> None:
    figures = {figure.name: figure for figure in plan_figures(FIGURES, SIZES, "int8")}
    varying = {"2": "backend", "3": "batch_size", "4": "max_seq_len", "6": "prompt_len"}
    fixed = figures["2"].rows[0].point
    assert (fixed.batch_size, fixed.prompt_len, fixed.max_seq_len) == (1, 16, 64)  # the first of each list
    for name, field in varying.items():
        points = [point.to_json() for point in figures[name].points]
        differing = {key for key in points[0] if len({point[key] for point in points}) > 1}
        assert differing == {field}
    assert [row.x for row in figures["3"].rows] == [1, 2, 8]
    assert [row.x for row in figures["4"].rows] == [32, 64, 128]
    assert [row.x for row in figures["6"].rows] == [4, 16, 40]
    assert {point.max_seq_len for point in figures["6"].points} == {128}
    shared = [point for figure in figures.values() for point in figure.points]
    assert len(set(shared)) < len(shared)
