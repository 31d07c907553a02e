"""What is measured after a generation may fail: the tokens are told before it, and the other figures after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import Result, invoke
from models import write_hf

from quantize.cli import command as quantize
from runtime.bench.journal import are_figures
from runtime.bench.points import Figure, Point, Row
from runtime.bench.report import summarize, to_markdown
from runtime.cli import command as llama_run
from runtime.devices import bandwidth
from runtime.devices.host import HostBackend
from runtime.run import measure, run, stored_model
from runtime.run.generate import Generator

IDS = "3,4,5,6"
PROBE, RSS, PEAK, LOGITS = "bandwidth utilisation", "host peak RSS", "device peak", "logit error of the cache"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("later")
    invoke(quantize, write_hf(root / "hf"), "--int8", "--out", root / "out")
    return root / "out"


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_BYTES", 1 << 20)


def arguments(shards: Path, *more: object) -> tuple[object, ...]:
    sizes = ("--max-new-tokens", 3, "--max-seq-len", 16, "--buckets", 8)
    return ("--shards", shards, "--backend", "eager", "--prompt-ids", IDS, "--kv-cache-dtype", "int8", *sizes, *more)


def rows_of(result: Result) -> dict[str, str]:
    """The table, by its labels."""
    return dict(line.split("  ", 1) for line in result.stdout.splitlines()[2:])


def raises(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def no_numbers(self: Generator, prompts: list[list[int]]) -> torch.Tensor:
    return torch.full((len(prompts), 50), float("nan"))


# Where a measurement fails, how, its name, and the reason that is shown.
FAILURES = {
    "XLA": (HostBackend, "read_bandwidth", raises(RuntimeError("RESOURCE_EXHAUSTED: 1G")), PROBE, "out of memory"),
    "memory": (HostBackend, "read_bandwidth", raises(MemoryError()), PROBE, "out of memory"),
    "a bug": (HostBackend, "read_bandwidth", raises(KeyError("x")), PROBE, "'x'"),
    "no word": (HostBackend, "read_bandwidth", raises(ValueError()), PROBE, "ValueError"),
    "lines": (HostBackend, "read_bandwidth", raises(RuntimeError("one\n two")), PROBE, "one two"),
    "account": (HostBackend, "peak_bytes", raises(RuntimeError("no account")), PEAK, "no account"),
    "getrusage": (measure, "host_peak_rss_bytes", raises(OSError(38, "No such call")), RSS, "[Errno 38] No such call"),
    "logits": (Generator, "logits", raises(RuntimeError("CUDA out of memory. Tried")), LOGITS, "out of memory"),
    "nan": (Generator, "logits", no_numbers, LOGITS, "the logits are not all finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_costs_its_own_figure(
    case: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, attribute, failure, name, reason = FAILURES[case]
    whole = invoke(llama_run, *arguments(shards, "--json", tmp_path / "whole.json"))
    monkeypatch.setattr(where, attribute, failure)
    result = invoke(llama_run, *arguments(shards, "--json", tmp_path / "run.json"))
    expected, found = (json.loads((tmp_path / f"{file}.json").read_text()) for file in ("whole", "run"))
    assert result.stdout.splitlines()[0] == whole.stdout.splitlines()[0] == ",".join(map(str, found["token_ids"][0]))
    assert found["token_ids"] == expected["token_ids"]
    rows = rows_of(result)
    assert rows.keys() == rows_of(whole).keys()
    assert [label for label, value in rows.items() if "not measured" in value] == [name]
    assert rows[name].strip().startswith(f"not measured ({reason}")
    assert result.stderr.count("Note: Not measured") == 1
    assert f"Note: Not measured: {name} ({reason}" in result.stderr
    nulls = {
        PROBE: {"bandwidth.read_bytes_per_s", "bandwidth.utilisation"},
        PEAK: set(),  # null on the CPU in any case
        RSS: {"memory.host_peak_rss_bytes"},
        LOGITS: {"kv_cache_logit_error"},
    }
    assert null_keys(found) - null_keys(expected) == nulls[name]
    assert found.keys() == expected.keys()


def null_keys(content: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in content.items():
        if isinstance(value, dict):
            found |= null_keys(value, f"{prefix}{key}.")
        elif value is None:
            found.add(prefix + key)
    return found


def test_memory_that_is_not_there(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own refusal of a buffer of a pebibyte."""
    monkeypatch.setattr(bandwidth, "_BYTES", 1 << 50)
    assert "not measured (out of memory)" in rows_of(invoke(llama_run, *arguments(shards)))[PROBE]


def test_tokens_are_told_before_anything_is_measured(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def look(self: HostBackend) -> None:
        told.append(sys.stdout.buffer.getvalue().decode())

    monkeypatch.setattr(HostBackend, "peak_bytes", look)
    stdout = invoke(llama_run, *arguments(shards)).stdout
    assert told == [stdout[: stdout.index("model ")]]
    assert told[0].count(",") == 2


@pytest.mark.parametrize("json_out", ["run.json", "-", None])
def test_interrupted_while_measuring(
    json_out: str | None, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is shown; the measurements that were to come are not made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HostBackend, "read_bandwidth", raises(KeyboardInterrupt()))
    monkeypatch.setattr(Generator, "logits", raises(AssertionError("measured all the same")))
    result = invoke(llama_run, *arguments(shards, *(("--json", json_out) if json_out else ())), exit_code=130)
    assert "Error: Interrupted" in result.stderr
    if json_out != "-":
        rows = rows_of(result)
        assert [rows[name].strip() for name in (PROBE, LOGITS)] == ["not measured (interrupted)"] * 2
    if json_out is not None:
        found = json.loads(result.stdout if json_out == "-" else (tmp_path / json_out).read_text())
        assert len(found["token_ids"][0]) == 3
        assert found["per_token_latency_ms"] > 0
        assert (found["bandwidth"]["utilisation"], found["kv_cache_logit_error"]) == (None, None)
        assert found["memory"]["host_peak_rss_bytes"] > 0


def test_text_that_the_tokenizer_cannot_make(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As the tokenizers library raises it."""

    class Codec:
        continuation = raises(Panic("index out of range"))

        def control_tokens(self) -> dict[int, str]:
            return {}

    monkeypatch.setattr(stored_model, "find_codec", lambda directory, rows: Codec())
    result = invoke(llama_run, *arguments(shards))
    assert result.stdout.splitlines()[0].count(",") == 2
    assert "Note: The tokenizer can't turn these tokens into text (index out of range)" in result.stderr
    found = json.loads(invoke(llama_run, *arguments(shards, "--json", "-")).stdout)
    assert found["text"] is None


# --- where the figures are written to


def test_json_in_a_folder_that_goes_away(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.setattr(HostBackend, "read_bandwidth", lambda self: shutil.rmtree(tmp_path / "gone") or 1e9)
    result = invoke(llama_run, *arguments(shards, "--json", tmp_path / "gone" / "run.json"), exit_code=2)
    assert rows_of(result)["new tokens (L)"].strip() == "3"
    memory, line = result.stderr.splitlines()
    assert memory.startswith("Note: Memory of this host: ")
    assert "could not be written (No such file or directory)" in line


def test_json_in_a_folder_that_is_not_there(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run", raises(AssertionError("ran all the same")))
    result = invoke(llama_run, *arguments(shards, "--json", tmp_path / "no" / "run.json"), exit_code=2)
    assert result.stdout == ""
    assert "can't be written" in result.stderr


def test_json_on_a_full_disk(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").symlink_to("/dev/full")
    result = invoke(llama_run, *arguments(shards, "--json", tmp_path / "run.json"), exit_code=2)
    assert rows_of(result)["new tokens (L)"].strip() == "3"
    assert "could not be written (No space left on device)" in result.stderr


def test_a_disk_that_fills_while_json_is_written(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of a file stays, and what was there before does."""
    (tmp_path / "run.json").write_text("before")
    monkeypatch.setattr(os, "fsync", raises(OSError(28, "No space left on device")))
    result = invoke(llama_run, *arguments(shards, "--json", tmp_path / "run.json"), exit_code=2)
    assert "could not be written (No space left on device)" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "before"


@pytest.mark.parametrize(("stdout", "status"), [("closed pipe", 1), ("/dev/full", 2)])
def test_stdout_that_fails_does_not_cost_the_json(stdout: str, status: int, shards: Path, tmp_path: Path) -> None:
    """In a process of its own, as after ``| head`` or with a full disk."""
    words = [sys.executable, "-c", "from runtime.cli import main; main()"]
    words += map(str, arguments(shards, "--json", tmp_path / "run.json"))
    if stdout == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(stdout, os.O_WRONLY)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert len(json.loads((tmp_path / "run.json").read_text())["token_ids"][0]) == 3


# --- llama-bench


def test_a_run_with_a_failed_measurement_counts_for_its_figures(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "host_peak_rss_bytes", raises(OSError(38, "Function not implemented")))
    monkeypatch.setattr(HostBackend, "read_bandwidth", raises(MemoryError()))
    figures = json.loads(invoke(llama_run, *arguments(shards, "--json", "-")).stdout)
    assert are_figures(figures)
    point = Point("eager", "int8", "bfloat16", 1, 4, 3, 16)
    bench = Figure("2", "Backends", "backend", (Row("eager", "eager", point),))
    settings = dict.fromkeys(("model", "torch", "torch_xla", "transformers", "cpus", "machine", "max_new_tokens"))
    done = {"point": point.to_json(), "wall_s": 1.0, "figures": figures}
    report = summarize([bench], [done], {}, settings | {"layers": 2})
    [row] = report["figures"][0]["rows"]
    assert (row["runs"], row["failed"], row["note"]) == (1, False, None)
    assert row["per_token_latency_ms"]["median"] == figures["per_token_latency_ms"]
    assert row["host_peak_rss_bytes"] is None
    assert f"| {figures['per_token_latency_ms']:.2f} (" in to_markdown(report)
