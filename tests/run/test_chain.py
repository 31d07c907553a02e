"""The three commands as installed, one after the other, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import virtual_chips
from invoke import invoke

from converters.console.units import parse_bytes
from converters.model.families.presets import PRESETS
from runtime.cli import command as run

KEYS = {
    "model", "platform", "chips", "batch_size", "prompt_tokens", "new_tokens", "latency_s", "per_token_latency_ms",
    "throughput_tokens_per_s", "prefill_ms", "prefill_executions", "first_token_ms", "load_s", "compile_s",
    "compile_cache", "recompilations", "bandwidth", "memory", "kv_cache_logit_error", "formulas", "token_ids", "text",
}  # fmt: skip
MEMORY_KEYS = {
    "parameter_bytes_per_chip", "kv_cache_bytes_per_chip", "kv_cache_dtype", "device_peak_bytes", "host_peak_rss_bytes",
}  # fmt: skip


def _run(folder: Path, command: str, *args: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A console script in ``folder``, with the environment of a user who has set nothing up but ``variables``."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PJRT_DEVICE", "XLA_FLAGS")}
    script = Path(sys.executable).with_name(command)
    words = [script, *map(str, args)]
    done = subprocess.run(words, cwd=folder, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `llama-convert --config tiny` and `llama-quantize --int8` have been run."""
    folder = tmp_path_factory.mktemp("chain")
    _run(folder, "llama-convert", "--config", "tiny")
    _run(folder, "llama-quantize", "--int8")
    return folder


def test_plain_lines_chain(folder: Path) -> None:
    done = _run(folder, "llama-run", "--shards", "out/")
    ids, _, *table = done.stdout.splitlines()
    assert len(ids.split(",")) == 128
    assert "recompilations           0" in table


def test_json_on_several_chips(folder: Path) -> None:
    """Every key of the contract, and the figures that follow from others."""
    _run(folder, "llama-quantize", "out", "--int8", "--chips", 3, "--out", "out3")
    words = ("--json", "-", "--batch-size", 2, "--max-new-tokens", 9, "--prompt-len", 40)
    done = _run(folder, "llama-run", "--shards", "out3", *words, XLA_FLAGS=virtual_chips.QUICK_FLAGS)
    figures = json.loads(done.stdout)
    assert set(figures) == KEYS
    assert set(figures["memory"]) == MEMORY_KEYS
    config = PRESETS["tiny"]
    expected = {"model": "tiny", "platform": "cpu/xla", "chips": 3, "batch_size": 2, "prompt_tokens": 40, "text": None}
    assert {key: figures[key] for key in expected} == expected
    assert figures["recompilations"] == 0
    assert figures["per_token_latency_ms"] == pytest.approx(1000 * figures["latency_s"] / figures["new_tokens"])
    bandwidth = figures["bandwidth"]
    read = bandwidth["step_bytes"] / (figures["per_token_latency_ms"] / 1000)
    assert bandwidth["utilisation"] == pytest.approx(read / bandwidth["read_bytes_per_s"])
    assert figures["first_token_ms"] > figures["prefill_ms"]
    assert figures["formulas"] == {
        "parameters": 19_794_176,
        "post_parameters": 12 * config.hidden_size**2 * config.num_layers,
        "post_parameter_bytes": 24 * config.hidden_size**2 * config.num_layers,
        "post_cache_bytes": config.num_layers * 2 * 2 * 256 * config.hidden_size * 2,
    }
    throughput = 2 * figures["new_tokens"] / figures["latency_s"]
    assert figures["throughput_tokens_per_s"] == pytest.approx(throughput)
    assert [len(row) <= 9 for row in figures["token_ids"]] == [True, True]
    heads_per_chip = 3  # 8 heads on 3 chips
    cache_bytes = 2 * config.num_layers * 2 * heads_per_chip * 256 * config.head_dim * 2
    assert figures["memory"]["kv_cache_bytes_per_chip"] == cache_bytes
    with (folder / "out3" / "chip-00-of-03.safetensors").open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    file_bytes = (folder / "out3" / "chip-00-of-03.safetensors").stat().st_size
    norms = (2 * config.num_layers + 1) * config.hidden_size * 2  # in float32 two bytes more each
    assert figures["memory"]["parameter_bytes_per_chip"] == file_bytes - 8 - header + norms
    assert figures["memory"]["device_peak_bytes"] is None
    assert figures["memory"]["host_peak_rss_bytes"] > 100e6


SHORT = ("--prompt-ids", "5,6,7", "--json", "-")


@pytest.fixture(scope="module")
def tokens_by_xla(folder: Path) -> list[list[int]]:
    return figures_of(folder, "--max-new-tokens", 8, "--dtype", "float32")["token_ids"]


def figures_of(folder: Path, *more: object) -> dict[str, Any]:
    """What llama-run tells in this process."""
    virtual_chips.start()
    with virtual_chips.quickly_compiled():
        return json.loads(invoke(run, "--shards", folder / "out", *SHORT, *more).stdout)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_other_backends_give_the_same_tokens(folder: Path, tokens_by_xla: list[list[int]], backend: str) -> None:
    other = figures_of(folder, "--max-new-tokens", 8, "--dtype", "float32", "--backend", backend)
    assert other["platform"].endswith(f"/{backend}")
    assert other["token_ids"] == tokens_by_xla
    assert other["recompilations"] == 0


def test_layers_cut_the_run(folder: Path) -> None:
    args = ("--max-new-tokens", 4, "--backend", "eager")
    whole, cut = (figures_of(folder, *args, *more) for more in ((), ("--layers", 1)))
    assert cut["memory"]["kv_cache_bytes_per_chip"] * 4 == whole["memory"]["kv_cache_bytes_per_chip"]
    assert cut["memory"]["parameter_bytes_per_chip"] < whole["memory"]["parameter_bytes_per_chip"]


def test_175b_keeps_the_seed_where_files_do_not_fit(tmp_path: Path) -> None:
    """As on any machine with less than 350 GB free; where there is more, nothing is left to prove here."""
    dry = _run(tmp_path, "llama-convert", "--config", "175B", "--dry-run").stdout
    if "a seed" not in dry:
        pytest.fail("This machine has room for 350 GB of weights; run this test with less disk.")
    begin = time.monotonic()
    done = _run(tmp_path, "llama-convert", "--config", "175B")
    assert time.monotonic() - begin < 30  # the one promise about time that users are given
    assert "Kept the seed" in done.stdout
    assert "free here" in done.stdout
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["config.json", "random_init.json"]


@pytest.mark.parametrize(
    "command", ["llama-convert", "llama-quantize", "llama-run", "llama-plan", "llama-bench", "llama-eval"]
)
def test_help_names_every_option_of_the_contract(command: str) -> None:
    promised = {
        "llama-convert": "--config --source --out --storage --seed --dtype --layers --max-shard-size --force --dry-run",
        "llama-quantize": "--int8 --bf16 --chips --target --only-chip --out --layers --force --verify --dry-run "
        "--quantize-lm-head",
        "llama-run": "--shards --prompt --prompt-ids --prompt-len --max-new-tokens --batch-size --max-seq-len "
        "--buckets --temperature --top-k --top-p --seed --dtype --kv-cache-dtype --backend --layers --compile-cache "
        "--json",
        "llama-plan": "--config --shards --int8 --bf16 --target --batch-size --max-seq-len --json",
        "llama-bench": "--shards --batch-size --prompt-len --max-seq-len --out --repeat --figures --force --json",
        "llama-eval": "--shards --text --against --tokens --window --dtype --kv-cache-dtype --activations --backend "
        "--compile-cache --layers --by-layer --plot --json",
    }
    text = _run(Path.cwd(), command, "--help").stdout
    assert [option for option in promised[command].split() if option not in text] == []


def test_sizes_are_read() -> None:
    assert [parse_bytes(text) for text in ("5GB", "1.5 kb", "2GiB", "7")] == [5 * 10**9, 1500, 2 * 2**30, 7]
