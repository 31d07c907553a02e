"""JSON is UTF-8 whatever the locale, and holds names that are no text in any encoding."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from invoke import invoke
from models import edit_json, write_hf

from converters.cli import command as convert
from converters.console.command import run
from converters.files.whole import json_bytes
from quantize.cli import command as quantize
from runtime.bench import report as bench_report
from runtime.bench.child import Runner
from runtime.bench_cli import command as bench
from runtime.cli import command as run_shards
from runtime.eval_cli import command as evaluate
from runtime.plan_cli import command as plan

NAME = "mod\u00e8le-\u6f22\u5b57"
NOT_TEXT = os.fsdecode(b"caf\xe9")  # Latin-1
ENCODINGS = ["ascii", "koi8-r", "latin-1", "utf-8"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with letters beyond ASCII in its name."""
    root = tmp_path_factory.mktemp("json")
    invoke(quantize, write_hf(root / "hf"), "--int8", "--out", root / "shards")
    edit_json(root / "shards" / "shards.json", lambda content: content.update(model=NAME))
    edit_json(root / "shards" / "config.json", lambda content: content.update(_name_or_path=NAME))
    return root / "shards"


def printed(command: object, arguments: list[object], encoding: str) -> bytes:
    """What a command writes to a stdout of an encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    with redirect_stdout(stream), pytest.raises(SystemExit) as end:
        run(command, [str(argument) for argument in arguments])
    assert end.value.code == 0
    return stream.buffer.getvalue()


RUN = ["--backend", "eager", "--prompt-ids", "1,5", "--max-new-tokens", 2, "--max-seq-len", 16, "--buckets", 8]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("command", "more"), [(plan, []), (run_shards, RUN)], ids=["plan", "run"])
def test_stdout_and_file(command: object, more: list[object], encoding: str, shards: Path, tmp_path: Path) -> None:
    arguments = ["--shards", shards, *more, "--json"]
    assert json.loads(printed(command, [*arguments, "-"], encoding).decode("utf-8"))["model"] == NAME
    printed(command, [*arguments, tmp_path / "file"], encoding)
    assert json.loads((tmp_path / "file").read_bytes().decode("utf-8"))["model"] == NAME


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bench(encoding: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"per_token_latency_ms": 1.0, "prefill_ms": 2.0, "platform": "cpu/x", "chips": 1}
    run_of = {"wall_s": 0.1, "figures": figures}
    monkeypatch.setattr(bench_report, "find_spec", lambda name: None)  # no pictures
    monkeypatch.setattr(Runner, "measure", lambda self, point: {"point": point.to_json()} | run_of)
    arguments = ["--shards", shards, "--figures", 3, "--batch-size", 1, "--repeat", 1, "--max-new-tokens", 2]
    arguments += ["--prompt-len", 3, "--max-seq-len", 16, "--out", tmp_path / "out", "--json"]
    found = json.loads(printed(bench, arguments, encoding).decode("utf-8"))
    assert found["settings"]["model"] == NAME
    assert found == json.loads((tmp_path / "out" / "bench.json").read_bytes().decode("utf-8"))


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "koi8-r"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
    ids=lambda variables: " ".join(variables.values()),
)
def test_in_another_locale(locale: dict[str, str], shards: Path) -> None:
    line = [sys.executable, "-c", "from runtime.plan_cli import main; main()", "--shards", str(shards)]
    done = subprocess.run([*line, "--json", "-"], env=os.environ | locale, capture_output=True, check=True)
    assert json.loads(done.stdout.decode("utf-8"))["model"] == NAME
    done = subprocess.run(line, env=os.environ | locale, capture_output=True, check=True)
    assert b"mod" in done.stdout  # with what the encoding lacks written as escapes


def test_a_name_that_is_no_text() -> None:
    content = json_bytes({"model": NOT_TEXT, "of": NAME})
    assert json.loads(content.decode("utf-8")) == {"model": NOT_TEXT, "of": NAME}
    assert b"caf\\udce9" in content
    assert NAME.encode() in content


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_paths_that_are_no_text(kind: str, tmp_path: Path) -> None:
    """Every stage reads and writes them; a model named after such a folder is valid JSON."""
    import torch
    from safetensors.torch import load_file

    source, checkpoint, shards = (tmp_path / f"{name}-{NOT_TEXT}" for name in ("source", "checkpoint", "shards"))
    write_hf(tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", source)
    if kind == "bin":
        with (source / "pytorch_model.bin").open("wb") as file:
            torch.save(load_file(tmp_path / "hf" / "model.safetensors"), file)
        (source / "model.safetensors").unlink()
    said = invoke(convert, "--source", source, "--out", checkpoint, "--check-logits").stdout
    assert "checkpoint-caf\\udce9" in said
    assert "as read by transformers" in said
    invoke(quantize, checkpoint, "--int8", "--out", shards, "--verify")
    for command, more in ((plan, []), (run_shards, RUN)):
        figures = tmp_path / f"figures-{NOT_TEXT}"
        invoke(command, "--shards", shards, *more, "--json", figures)
        json.loads(figures.read_bytes().decode("utf-8"))
    invoke(convert, "--source", shards, "--out", tmp_path / f"back-{NOT_TEXT}")
    invoke(plan, "--config", checkpoint / "config.json")


def test_refusals_of_arguments_that_are_no_text(shards: Path, tmp_path: Path) -> None:
    for command, arguments in (
        (convert, ("--config", NOT_TEXT)),
        (convert, ("--source", tmp_path / NOT_TEXT)),
        (convert, (f"--{NOT_TEXT}",)),
        (quantize, (tmp_path / NOT_TEXT, "--int8")),
        (plan, ("--target", NOT_TEXT)),
        (run_shards, ("--shards", shards, "--prompt-ids", NOT_TEXT)),
        (run_shards, ("--shards", shards, "--buckets", NOT_TEXT)),
        (bench, ("--shards", shards, "--batch-size", NOT_TEXT)),
        (evaluate, ("--shards", shards, "--text", f"{NOT_TEXT}.txt")),
    ):
        assert "caf\\udce9" in invoke(command, *arguments, exit_code=2).stderr
