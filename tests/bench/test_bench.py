"""llama-bench as a command: turns, time, kills, what it refuses; and once, slowly, everything for real."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from invoke import SUPPORT, Result, invoke, refuse
from models import edit_json, snapshot, write_hf

from converters.cli import command as convert
from converters.output import preflight
from quantize.cli import command as quantize
from quantize.shards.reading import Shards
from runtime.bench import bench as bench_module
from runtime.bench import report as bench_report
from runtime.bench.bench import sweep
from runtime.bench.child import Runner
from runtime.bench.journal import RunJournal, open_journal
from runtime.bench.points import FIGURES, Point
from runtime.bench_cli import command as bench
from runtime.cli import command as run

SIZES = ("--batch-size", "1,2", "--prompt-len", "8,24", "--max-seq-len", "32,64", "--max-new-tokens", 3)
POINTS = 9  # of figures 2, 3, 4, 6 and the baseline in these sizes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a small model (128 positions), of another, and a folder that a bench has nothing to do with."""
    root = tmp_path_factory.mktemp("bench")
    write_hf(root / "hf")
    write_hf(root / "other", vocab_size=50, rope_theta=5.0)
    for name, source, *options in (
        ("shards", "hf", "--int8", "--chips", 2), ("bf16", "hf", "--bf16", "--chips", 2),
        ("bf16-of-3", "hf", "--bf16", "--chips", 3), ("bf16-of-another", "other", "--bf16", "--chips", 2),
        ("fp8", "hf", "--fp8", "--chips", 2), ("int4", "hf", "--int4", "--group-size", "channel", "--chips", 2),
        ("int8-zp", "hf", "--int8", "--zero-points", "--chips", 2),
    ):  # fmt: skip
        invoke(quantize, root / source, *options, "--out", root / name)
    invoke(quantize, root / "hf", "--int8", "--chips", 2, "--out", root / "part")
    (root / "part" / "chip-01-of-02.safetensors").unlink()
    (root / "taken").mkdir()
    (root / "taken" / "bench.csv").write_text("mine")
    (root / "file").write_text("mine")
    return root


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--shards"),
        (("--shards", "none"), "none"),
        (("--shards", "hf"), "hf has no shards.json"),
        (("--shards", "part", *SIZES), "part lacks chip-01-of-02"),
        *((("--shards", "shards", option, value), option)
          for option in ("--batch-size", "--prompt-len", "--max-seq-len")
          for value in ("", "0", "-1", "x", "1,1", "1,,2", "1.5")),
        (("--shards", "shards", "--figures", "2,7"), "'7' is no figure; valid: 2,3,4,5,6,baseline"),
        (("--shards", "shards", "--repeat", "0"), "--repeat"),
        (("--shards", "shards", "--minutes", "0"), "--minutes"),
        (("--shards", "shards", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("--shards", "shards", *SIZES, "--layers", "3"), "--layers 3 does not fit small; give 1 to 2"),
        (("--shards", "shards", "--max-seq-len", "256"), "--max-seq-len 256 is beyond the model's 128 positions"),
        (("--shards", "shards", "--prompt-len", "100", "--max-new-tokens", "30"), "need a cache of 129"),
        (("--shards", "shards", "--prompt-len", "40", "--max-seq-len", "64,32"), "--max-seq-len has 32 (the first"),
        (("--shards", "shards", "--prompt-len", "8,60", "--max-seq-len", "64,50"), "A prompt of 60"),
        (("--shards", "bf16", *SIZES), "bf16 holds bfloat16 shards. Give quantized shards as well"),
        (("--shards", "fp8", "--shards", "none", *SIZES), "none"),
        (("--shards", "fp8", "--shards", "part", *SIZES), "part lacks chip-01-of-02"),
        (("--shards", "fp8", "--shards", "bf16-of-another", *SIZES), "bf16-of-another holds another model than fp8"),
        (("--shards", "bf16-of-3", "--shards", "fp8", *SIZES), "fp8 is for 2 chips and bf16-of-3 for 3"),
        (("--shards", "fp8", "--shards", "int8-zp", "--shards", "fp8", *SIZES), "fp8 and fp8 both hold fp8 shards"),
        (("--shards", "fp8", "--shards", "bf16", *SIZES, "--bf16-shards", "bf16"), "both hold bf16 shards"),
        (("--shards", "fp8", "--shards", "int4", *SIZES, "--out", "int4"), "is an input"),
        (("--shards", "shards", *SIZES, "--bf16-shards", "int8-zp"), "holds int8, zero points shards"),
        (("--shards", "shards", *SIZES, "--bf16-shards", "shards"), "holds int8 shards"),
        (("--shards", "shards", *SIZES, "--bf16-shards", "bf16-of-3"), "for 3 chips and shards for 2"),
        (("--shards", "shards", *SIZES, "--bf16-shards", "bf16-of-another"), "another model"),
        (("--shards", "shards", *SIZES, "--bf16-shards", "none"), "none"),
        (("--shards", "shards", *SIZES, "--out", "shards"), "is an input"),
        (("--shards", "shards", *SIZES, "--out", "file"), "file is a file"),
        (("--shards", "shards", *SIZES, "--out", "taken"), "was not written by a bench"),
        (("--shards", "shards", "surplus"), "surplus"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(root: Path, arguments: tuple[Any, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    refuse(root, bench, *arguments, says=[says])


@pytest.mark.parametrize("arguments", [["--help"], ["--figures", "9"], ["--shards", "none"]])
def test_answers_without_loading_anything_heavy(arguments: list[str]) -> None:
    heavy = ("torch", "torch_xla", "numpy", "rich", "transformers", "matplotlib", "safetensors")
    code = (
        "import sys\nfrom runtime.bench_cli import main\n"
        f"try:\n    main()\nfinally:\n    print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("more", [("--max-new-tokens", 256), ("--max-seq-len", "64,256")], ids=str)
def test_defaults_fit_the_sizes_that_are_given(tmp_path: Path, more: tuple[object, ...]) -> None:
    write_hf(tmp_path / "hf", max_position_embeddings=2048)
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "shards")
    result = invoke(bench, "--shards", tmp_path / "shards", "--out", tmp_path / "out", "--figures", "3,4,6",
                    "--minutes", 1e-9, *more)  # fmt: skip
    assert "The time is up" in result.stderr


class _Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _points(*batches: int, backend: str = "xla") -> list[Point]:
    return [Point(backend, "int8", "bfloat16", batch, 8, 3, 32) for batch in batches]


def _sweep(
    journal: RunJournal, points: list[Point], repeat: int, deadline: float, failing: tuple[int, ...] = ()
) -> tuple[int, list[int]]:
    """A sweep in which a point of batch b takes b seconds: runs left, and the batches measured in order."""
    clock, order = _Clock(), []

    def measure(point: Point) -> dict[str, Any]:
        clock.now += point.batch_size
        order.append(point.batch_size)
        figures = {"per_token_latency_ms": 1.0, "prefill_ms": 0.0, "platform": "cpu/xla", "chips": 1}
        outcome = {"error": "broken"} if point.batch_size in failing else {"figures": figures}
        return {"point": point.to_json(), "wall_s": float(point.batch_size)} | outcome

    return sweep(points, journal, measure, repeat, deadline, clock), order


def test_points_take_turns(tmp_path: Path) -> None:
    with open_journal(tmp_path / "j", {}, force=False) as journal:
        assert _sweep(journal, _points(1, 2, 3), 3, 1e9) == (0, [1, 2, 3] * 3)
        assert _sweep(journal, _points(1, 2, 3), 3, 1e9) == (0, [])


def test_no_run_is_begun_that_would_not_be_over_in_time(tmp_path: Path) -> None:
    """The second turn of the long point is left, those of the short ones fit; a later sweep does what is left."""
    points = _points(1, 2, 10)
    with open_journal(tmp_path / "j", {}, force=False) as journal:
        assert _sweep(journal, points, 2, 17.5) == (1, [1, 2, 10, 1, 2])
        assert _sweep(journal, points, 2, 1e9) == (0, [10])


def test_a_failing_point_is_left_at_that_and_tried_again_by_a_rerun(tmp_path: Path) -> None:
    points = _points(1, 2)
    with open_journal(tmp_path / "j", {}, force=False) as journal:
        assert _sweep(journal, points, 2, 1e9, failing=(1,)) == (0, [1, 2, 2])
        assert _sweep(journal, points, 2, 1e9) == (0, [1, 1])
        assert [len(journal.of(point.to_json())) for point in points] == [2, 2]


def test_runs_of_two_devices_are_not_mixed(tmp_path: Path) -> None:
    with open_journal(tmp_path / "j", {}, force=False) as journal:
        _sweep(journal, _points(1), 1, 1e9)
        journal.runs[0]["figures"]["platform"] = "tpu/xla"
        with pytest.raises(bench_module.InputError, match="begun on tpu/xla with 1 chips and this is cpu/xla"):
            _sweep(journal, _points(1), 2, 1e9)


def _command(root: Path, out: Path, *more: object) -> list[str]:
    child = SUPPORT / "child_bench.py"
    figures = ",".join(name for name in FIGURES if name != "5")  # whose shards would have torch loaded
    arguments = ("--shards", root / "shards", "--out", out, "--figures", figures, *SIZES, "--repeat", 3, *more)
    return [sys.executable, str(child), str(out) + ".log", *map(str, arguments)]


def _raw_runs(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()[1:]]


def test_killed_anywhere_a_rerun_goes_on(root: Path, tmp_path: Path) -> None:
    """SIGKILL a random while after a random run has begun, four times: the same points, no finished run done again."""
    chance = random.Random(0)
    out, log = tmp_path / "out", tmp_path / "out.log"
    log.touch()
    finished: list[dict[str, Any]] = []
    for _ in range(4):
        child = subprocess.Popen(_command(root, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = len(log.read_bytes().splitlines()) + chance.randint(1, 4)
        while child.poll() is None and len(log.read_bytes().splitlines()) < target:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        child.kill()
        assert child.wait() == -signal.SIGKILL
        whole = (out / "runs.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()[1:]
        runs = [json.loads(line) for line in whole]
        assert runs[: len(finished)] == finished
        finished = runs
    subprocess.run(_command(root, out), check=True, capture_output=True)
    runs = _raw_runs(out)
    assert runs[: len(finished)] == finished
    counts = Counter(json.dumps(run["point"]) for run in runs)
    assert len(counts) == POINTS
    assert set(counts.values()) == {3}
    begun = len(log.read_bytes().splitlines())
    assert len(runs) <= begun <= len(runs) + 4  # each kill costs the run that it fell into, no other
    report = json.loads((out / "bench.json").read_text())
    assert all(row["runs"] == 3 for figure in report["figures"] for row in figure["rows"])


def test_a_finished_bench_is_reported_again_and_other_arguments_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = subprocess.run(_command(root, out), check=True, capture_output=True, text=True)
    log = (tmp_path / "out.log").read_text()
    again = subprocess.run(_command(root, out), check=True, capture_output=True, text=True)
    assert again.stdout == first.stdout == (out / "bench.md").read_text()
    assert (tmp_path / "out.log").read_text() == log
    before = (out / "runs.jsonl").read_bytes()
    other = subprocess.run(_command(root, out, "--repeat", 2), check=False, capture_output=True, text=True)
    assert other.returncode == 2
    assert "repeat 3, now 2" in other.stderr
    assert "--force" in other.stderr
    assert len(other.stderr.splitlines()) == 1
    assert (out / "runs.jsonl").read_bytes() == before
    subprocess.run(_command(root, out, "--repeat", 2, "--force"), check=True, capture_output=True)
    assert len(_raw_runs(out)) == 2 * POINTS
    printed = subprocess.run(_command(root, out, "--repeat", 2, "--json"), check=True, capture_output=True, text=True)
    assert json.loads(printed.stdout) == json.loads((out / "bench.json").read_text())


def test_other_shards_are_noticed(root: Path, tmp_path: Path) -> None:
    invoke(quantize, root / "hf", "--int8", "--chips", 2, "--out", tmp_path / "shards")
    subprocess.run(_command(tmp_path, tmp_path / "out"), check=True, capture_output=True)
    edit_json(tmp_path / "shards" / "shards.json", lambda content: content.update(source_fingerprint="other"))
    done = subprocess.run(_command(tmp_path, tmp_path / "out"), check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "started with other shards (shards)" in done.stderr


def test_without_transformers_the_rows_say_what_to_install(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "find_spec", lambda name: None)
    result = invoke(bench, "--shards", root / "shards", "--out", tmp_path / "out", "--figures", "baseline", *SIZES,
                    "--minutes", 1e-9)  # fmt: skip
    assert result.stdout.count("transformers is not installed: pip install") == 4
    assert "with 3 runs left" in result.stderr


def test_rows_that_fail_end_as_an_error(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rows are measured and reported all the same."""

    def measure(self: Runner, point: Point) -> dict[str, Any]:
        figures = {"per_token_latency_ms": 1.0, "prefill_ms": 0.0, "platform": "cpu/xla", "chips": 1}
        outcome = {"error": "out of | memory"} if point.batch_size == 2 else {"figures": figures}
        return {"point": point.to_json(), "wall_s": 0.0} | outcome

    monkeypatch.setattr(Runner, "measure", measure)
    out = tmp_path / "out"
    result = invoke(bench, "--shards", root / "shards", "--out", out, "--figures", 3, *SIZES, exit_code=1)
    assert "batch 2 | failed: out of / memory" in result.stdout
    assert "Error: 1 row failed" in result.stderr
    assert [row["runs"] for row in json.loads((out / "bench.json").read_text())["figures"][0]["rows"]] == [3, 0]
    assert (out / "figure-3.png").exists()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Runs that take no time, and no pictures; the list has the points measured."""
    measured: list[Point] = []

    def measure(self: Runner, point: Point) -> dict[str, Any]:
        assert Shards(self.shards[point.weights]).manifest.scheme.name == point.weights
        measured.append(point)
        figures = {"per_token_latency_ms": 1.0, "prefill_ms": 0.0, "platform": "cpu/xla", "chips": 1}
        return {"point": point.to_json(), "wall_s": 0.0, "figures": figures}

    monkeypatch.setattr(Runner, "measure", measure)
    monkeypatch.setattr(bench_report, "find_spec", lambda name: None)
    return measured


def test_forced_figure_5_is_measured_anew_with_other_arguments(
    root: Path, tmp_path: Path, quick: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bfloat16 shards are made anew with the runs; where the disk has no room for them, all stays as it was."""
    out = tmp_path / "out"
    arguments = ("--shards", root / "shards", "--figures", "5,3", *SIZES, "--repeat", 1, "--out", out)
    invoke(bench, *arguments, "--layers", 1)
    refuse(tmp_path, bench, *arguments, "--layers", 2, says=["layers 1, now 2", "--force"])
    with monkeypatch.context() as patch:
        patch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        refuse(tmp_path, bench, *arguments, "--layers", 2, "--force", says=["bf16-shards needs"])
    quick.clear()
    invoke(bench, *arguments, "--layers", 2, "--force")
    assert len(quick) == len(_raw_runs(out)) == 4
    assert Shards(out / "bf16-shards").config.num_layers == 2
    shutil.copytree(root / "shards", tmp_path / "shards")
    edit_json(tmp_path / "shards" / "shards.json", lambda content: content.update(source_fingerprint="other"))
    invoke(bench, "--shards", tmp_path / "shards", *arguments[2:], "--layers", 2, "--force")
    assert len(quick) == 8


def _bench(root: Path, out: Path, names: Sequence[str]) -> Result:
    given = [word for name in names for word in ("--shards", root / name)]
    return invoke(bench, *given, "--figures", "3,5", *SIZES, "--repeat", 1, "--out", out)


def test_figure_5_compares_every_format_that_is_given(root: Path, tmp_path: Path, quick: list[Point]) -> None:
    """Figure 3 measures the first, of which bfloat16 is made; a rerun is the same with the others in another order."""
    out, names = tmp_path / "out", ("int8-zp", "shards", "fp8", "int4")
    assert f"dequantized from those in {root / 'int8-zp'}" in _bench(root, out, names).stderr
    report = json.loads((out / "bench.json").read_text())
    batches, formats = (figure["rows"] for figure in report["figures"])
    assert [row["weights"] for row in batches] == ["int8-zp"] * 2
    order = ("bf16", "fp8", "int8", "int8-zp", "int4")
    assert [row["label"] for row in formats] == [f"batch {batch}, {name}" for batch in (1, 2) for name in order]
    assert all(row["runs"] == 1 for row in formats)
    assert len(quick) == 10
    assert {key for key in report["settings"] if key.endswith("digest") and report["settings"][key]} == {
        "shards_digest", "int8_shards_digest", "fp8_shards_digest", "int4_shards_digest"
    }  # fmt: skip
    assert _bench(root, out, ("int8-zp", "int4", "fp8", "shards")).stdout == (out / "bench.md").read_text()
    assert len(quick) == 10
    shutil.copytree(root / "int4", tmp_path / "int4")
    edit_json(tmp_path / "int4" / "shards.json", lambda content: content.update(source_fingerprint="other"))
    with pytest.raises(AssertionError, match=r"other shards \(int4-shards\)"):
        _bench(root, out, ("int8-zp", "shards", "fp8", tmp_path / "int4"))


@pytest.mark.parametrize("names", [("bf16", "int8"), ("int8", "bf16")])
def test_bf16_among_the_shards_is_figure_5s(root: Path, tmp_path: Path, quick: list[Point], names: Any) -> None:
    _bench(root, tmp_path / "out", ["shards" if name == "int8" else name for name in names])
    assert not (tmp_path / "out" / "bf16-shards").exists()
    assert {point.weights for point in quick} == {"bf16", "int8"}
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {row["weights"] for row in report["figures"][0]["rows"]} == {names[0]}


def test_a_bench_that_measured_nothing_gives_way(root: Path, tmp_path: Path, quick: list[Point]) -> None:
    out = tmp_path / "out"
    arguments = ("--shards", root / "shards", "--figures", "5", *SIZES, "--repeat", 1, "--out", out)
    invoke(bench, *arguments, "--layers", 1, "--minutes", 1e-9)
    assert (len(quick), Shards(out / "bf16-shards").config.num_layers) == (0, 1)
    invoke(bench, *arguments, "--layers", 2)
    assert (len(quick), Shards(out / "bf16-shards").config.num_layers) == (4, 2)


def test_bf16_shards_are_made_only_for_runs_that_are_left(root: Path, tmp_path: Path, quick: list[Point]) -> None:
    out = tmp_path / "out"
    arguments = ("--shards", root / "shards", "--figures", "5", *SIZES, "--repeat", 2, "--out", out)
    invoke(bench, *arguments)
    made = snapshot(out / "bf16-shards")
    shutil.rmtree(out / "bf16-shards")
    invoke(bench, *arguments)
    assert not (out / "bf16-shards").exists()
    (out / "runs.jsonl").write_text("".join((out / "runs.jsonl").read_text().splitlines(keepends=True)[:-2]))
    invoke(bench, *arguments)
    assert snapshot(out / "bf16-shards") == made
    assert len(_raw_runs(out)) == 8


@pytest.mark.parametrize("name", ["bench.csv", "compile-cache/graph", "bf16-shards/config.json"])
@pytest.mark.parametrize("journal", [None, "", '{"loss": 1.5}\n'])
def test_files_of_no_bench_are_kept(
    root: Path, tmp_path: Path, quick: list[Point], name: str, journal: str | None
) -> None:
    """Whatever stands in runs.jsonl, unless its first line is a bench's, and whatever is forced."""
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    if journal is not None:
        (out / "runs.jsonl").write_text(journal)
    arguments = ("--shards", root / "shards", "--figures", "3,5", *SIZES, "--out", out)
    for force in ((), ("--force",)):
        refuse(tmp_path, bench, *arguments, *force, says=[name.partition("/")[0], "was not written by a bench"])
    (out / name).unlink()
    (out / name).parent.rmdir() if name.count("/") else None
    if journal:
        refuse(tmp_path, bench, *arguments, "--force", says=["runs.jsonl was not written by llama-bench"])
    assert not quick


@pytest.mark.parametrize("backend", ["xla", "inductor", "eager"])
def test_the_command_line_of_a_run(tmp_path: Path, backend: str) -> None:
    """Every option that is passed is one that llama-run has; a compile cache only where something is compiled."""
    runner = Runner({"int8": tmp_path}, 2, tmp_path / "cache")
    arguments = runner.arguments(Point(backend, "int8", "bfloat16", 4, 8, 3, 32))
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given.keys() <= {option for parameter in run.params for option in parameter.opts}
    assert ("--compile-cache" in given) == (backend != "eager")
    assert given["--buckets"] == "32"
    assert (given["--batch-size"], given["--layers"], given["--json"]) == ("4", "2", "-")


@pytest.mark.slow
def test_real_runs_of_eager_and_of_transformers(root: Path, tmp_path: Path) -> None:
    """Figures of a process of its own; a run that can't be done gives its one line."""
    runner = Runner({"int8": root / "shards", "bf16": root / "none"}, None, tmp_path)
    eager, broken = (Point("eager", weights, "bfloat16", 2, 8, 3, 32) for weights in ("int8", "bf16"))
    figures = runner.measure(eager)["figures"]
    assert (figures["platform"], figures["batch_size"], figures["prompt_tokens"]) == ("cpu/eager", 2, 8)
    assert "token_ids" not in figures
    error = runner.measure(broken)["error"]
    assert str(root / "none") in error
    assert "\n" not in error
    baseline = runner.measure(Point("transformers-eager", "int8", "float32", 2, 8, 3, None))
    assert baseline["figures"]["new_tokens"] == 3


@pytest.mark.slow
def test_a_whole_bench(tmp_path: Path) -> None:
    """Every figure of a model of one layer, killed once on its way: what the files say follows from the raw runs."""
    invoke(convert, "--config", "tiny", "--layers", 1, "--out", tmp_path / "checkpoint")
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--chips", 2, "--out", tmp_path / "shards")
    out = tmp_path / "out"
    arguments = ["--shards", tmp_path / "shards", "--out", out, *SIZES, "--repeat", 2, "--minutes", 60]
    line = [sys.executable, "-c", "from runtime.bench_cli import main; main()", *map(str, arguments)]
    killed = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "runs.jsonl").exists() or (out / "runs.jsonl").read_bytes().count(b"\n") < 2:
        assert killed.poll() is None
        time.sleep(0.1)
    time.sleep(random.Random(1).uniform(0, 3))
    children = _children(killed.pid)
    killed.kill()
    killed.wait()
    finished = _raw_runs(out)
    time.sleep(1)
    assert children
    assert not [pid for pid in children if _is_running(pid)]  # a run ends with its bench
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = _raw_runs(out)
    assert runs[: len(finished)] == finished
    assert set(Counter(json.dumps(run["point"]) for run in runs).values()) == {2}
    report = json.loads((out / "bench.json").read_text())
    assert set(report["platforms"]) == {
        "cpu/xla", "cpu/eager", "cpu/inductor", "cpu/transformers-lazy", "cpu/transformers-eager"
    }  # fmt: skip
    _check_files(out, report, runs)
    lazy = next(run["figures"] for run in runs if run["point"]["backend"] == "transformers-lazy")
    assert lazy["compilations"] >= 1 + lazy["new_tokens"]  # the prompt's, and one for every length
    assert lazy["repeated_per_token_latency_ms"] < lazy["per_token_latency_ms"]
    assert all(run["figures"]["recompilations"] == 0 for run in runs if "recompilations" in run["figures"])


def _check_files(out: Path, report: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    from matplotlib.image import imread

    rows = [row for figure in report["figures"] for row in figure["rows"]]
    with (out / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    markdown = (out / "bench.md").read_text()
    for row, line in zip(rows, lines, strict=True):
        key = "repeated_per_token_latency_ms" if "again" in row["label"] else "per_token_latency_ms"
        own = [r["figures"][key] for r in runs if all(r["point"][name] == row[name] for name in r["point"])]
        assert row["per_token_latency_ms"]["median"] == statistics.median(own)
        assert float(line["per_token_latency_ms_median"]) == statistics.median(own)
        assert f"| {row['label']} | {row['platform']}" in markdown
        assert f"| {statistics.median(own):.2f} ({min(own):.2f} - {max(own):.2f}) |" in markdown
    for name in FIGURES:
        assert min(imread(out / f"figure-{name}.png").shape[:2]) > 500


def _children(pid: int) -> list[int]:
    """The processes that a process has started."""
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [number for number in numbers if _status(number)[1:2] == [str(pid)]]


def _is_running(pid: int) -> bool:
    """Not gone, and not a zombie that nobody has asked for."""
    return _status(pid)[:1] not in ([], ["Z"])


def _status(pid: int) -> list[str]:
    """A process's state and its parent's number (proc(5)); nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return []
