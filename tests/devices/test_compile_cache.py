"""A second start with a compile cache: loaded where the library can, and never counted as anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from invoke import invoke, invoke_error
from models import write_hf

from quantize.cli import command as quantize
from runtime.cli import command as run


def _start(shards: Path, backend: str, cache: Path) -> dict[str, Any]:
    """Figures of llama-run in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    line = [sys.executable, "-c", "from runtime.cli import main; main()", "--shards", str(shards)]
    line += ["--backend", backend, "--prompt-ids", "3,4,5", "--max-new-tokens", "3", "--buckets", "8"]
    line += ["--max-seq-len", "16", "--compile-cache", str(cache), "--json", "-"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    invoke(quantize, write_hf(tmp_path / "hf"), "--int8", "--out", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.slow
def test_inductor_loads_on_the_second_start(shards: Path, tmp_path: Path) -> None:
    first, second = (_start(shards, "inductor", tmp_path / "cache") for _ in range(2))
    assert first["compile_cache"] == {"hits": 0, "misses": 2, "failures": 0}  # a bucket and the decode step
    assert second["compile_cache"] == {"hits": 2, "misses": 0, "failures": 0}
    assert first["token_ids"] == second["token_ids"]
    assert first["recompilations"] == second["recompilations"] == 0


@pytest.mark.slow
def test_xla_says_what_it_could_load(shards: Path, tmp_path: Path) -> None:
    """torch_xla 2.9.0 keeps its programs and can't load them; another version may. Every graph is accounted for."""
    first, second = (_start(shards, "xla", tmp_path / "cache") for _ in range(2))
    assert first["compile_cache"] == {"hits": 0, "misses": 2, "failures": 0}
    assert len(list((tmp_path / "cache").iterdir())) == 2
    use = second["compile_cache"]
    assert use["misses"] == 0
    assert use["hits"] + use["failures"] == 2
    assert first["token_ids"] == second["token_ids"]
    assert first["recompilations"] == second["recompilations"] == 0


def test_eager_has_nothing_to_keep(shards: Path, tmp_path: Path) -> None:
    message = invoke_error(run, "--shards", shards, "--backend", "eager", "--compile-cache", tmp_path / "cache")
    assert "compiles nothing" in message
    assert not (tmp_path / "cache").exists()
