"""Killed while it calibrates or while it writes: a rerun ends byte-identical to an undisturbed run."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import child_command
import pytest
import torch
from calibrated import content, make_inputs, write_text
from invoke import Killed, invoke, kill_at
from models import make_opt, snapshot

from converters.formats.safetensors import SafetensorsWriter
from converters.output import journal
from quantize.cli import command as quantize
from quantize.values import Quantizer
from runtime.calibrate.calibrator import FeedbackLayers
from runtime.calibrate.scratch import Scratch

METHODS = ("scale", "gptq", "awq")
INT4 = ("--int4", "--group-size", 64)
KILLS = 10
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["quantize.job", "quantize.cli", "runtime.calibrate.calibrator"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def arguments(made: tuple[Path, Path], method: str, root: Path) -> tuple[object, ...]:
    kept = () if method == "gptq" else ("--moments", root / "moments")
    return made[0], *INT4, "--calibrate", made[1], "--method", method, *kept, "--chips", 3, "--out", root / "out"


@pytest.fixture(scope="module")
def whole(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By method, what an undisturbed run leaves."""
    found = {}
    for method in METHODS:
        root = tmp_path_factory.mktemp(method)
        invoke(quantize, *arguments(made, method, root))
        found[method] = left(root)
    return found


def left(root: Path) -> dict[str, str]:
    """Of --out and --moments."""
    each = {folder: content(root / folder) for folder in ("out", "moments") if (root / folder).exists()}
    return {f"{folder}/{name}": digest for folder, files in each.items() for name, digest in files.items()}


@pytest.mark.parametrize("method", ["scale", "awq"])
def test_killed_in_each_layer(
    made: tuple[Path, Path], whole: dict[str, dict[str, str]], method: str, tmp_path: Path
) -> None:
    """While moments are gathered; the next run begins behind the last layer that was kept."""
    save, layers = Scratch.save, []

    def save_and_die(self: Scratch, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        layers.append(layer)
        save(self, layer, tensors)
        raise Killed

    for number in range(4):
        kill_at(Scratch, "save", quantize, *arguments(made, method, tmp_path), instead=save_and_die)
        assert layers == list(range(number + 1))
    invoke(quantize, *arguments(made, method, tmp_path))
    assert left(tmp_path) == whole[method]


def test_feedback_goes_on_where_it_was(
    made: tuple[Path, Path], whole: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither are layers that were written rounded again nor their inputs computed again."""
    encoded, run = FeedbackLayers.encoded, FeedbackLayers._run
    asked, computed = [], []

    def encoded_or_die(self: FeedbackLayers, number: int) -> object:
        time.sleep(0.2)  # as long as a real layer takes: what is before it gets to the disk meanwhile
        if number == 3:
            raise Killed
        return encoded(self, number)

    kill_at(FeedbackLayers, "encoded", quantize, *arguments(made, "gptq", tmp_path), instead=encoded_or_die)
    monkeypatch.setattr(FeedbackLayers, "encoded", lambda self, n: (asked.append(n), encoded(self, n))[1])
    monkeypatch.setattr(FeedbackLayers, "_run", lambda self, n, *rest: (computed.append(n), run(self, n, *rest))[1])
    invoke(quantize, *arguments(made, "gptq", tmp_path))
    assert asked == computed
    assert asked in ([1, 2, 3], [2, 3], [3])
    assert left(tmp_path) == whole["gptq"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("blocks", [3, 40, 90])
def test_killed_while_writing(
    made: tuple[Path, Path], whole: dict[str, dict[str, str]], method: str, blocks: int, tmp_path: Path
) -> None:
    """With a journal after every parameter, so that the next run goes on in a later layer."""
    append, count = SafetensorsWriter.append, [0]

    def append_or_die(self: SafetensorsWriter, tensor: torch.Tensor) -> None:
        count[0] += 1
        if count[0] > blocks:
            raise Killed
        append(self, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SYNC_BYTES", 1)
        kill_at(SafetensorsWriter, "append", quantize, *arguments(made, method, tmp_path), instead=append_or_die)
    invoke(quantize, *arguments(made, method, tmp_path))
    assert left(tmp_path) == whole[method]


def test_what_was_kept_for_another_text(
    made: tuple[Path, Path], tmp_path: Path, whole: dict[str, dict[str, str]]
) -> None:
    """Layers of another run in the same folder are replaced, and never read."""
    other = write_text(tmp_path / "other.json", seed=3)
    kill_at(Scratch, "clear", quantize, *arguments((made[0], other), "gptq", tmp_path))
    assert list((tmp_path / "out").glob("calibration-*"))
    invoke(quantize, *arguments(made, "gptq", tmp_path), "--force")
    assert left(tmp_path) == whole["gptq"]


def test_a_damaged_layer_is_not_read(made: tuple[Path, Path], tmp_path: Path) -> None:
    """It may be anyone's: it is named, and stays."""
    encoded = FeedbackLayers.encoded

    def encoded_or_die(self: FeedbackLayers, number: int) -> object:
        if number == 2:
            raise Killed
        return encoded(self, number)

    kill_at(FeedbackLayers, "encoded", quantize, *arguments(made, "gptq", tmp_path), instead=encoded_or_die)
    path = tmp_path / "out" / "calibration-00001.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    error = invoke(quantize, *arguments(made, "gptq", tmp_path), exit_code=2).stderr
    assert f"{path} was not written by this tool" in error
    assert path.stat().st_size == 1000


def test_files_of_another_run(tmp_path: Path) -> None:
    """Only those of the same key are read, the latest of the layers before the one that is asked for."""
    ours, other = Scratch(tmp_path, "ours"), Scratch(tmp_path, "other")
    for layer in range(3):
        ours.save(layer, {"x": torch.full((2,), float(layer))})
    assert other.last(3) is None
    assert ours.last(0) is None
    layer, tensors = ours.last(2)
    assert (layer, tensors["x"].tolist()) == (1, [1.0, 1.0])
    other.save(1, {"x": torch.zeros(2)})
    assert ours.last(2)[0] == 0


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layers_of_few_tensors(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT with neither biases nor norms' weights has six to a layer: more layers than two are on their way at once."""
    block = Quantizer.block

    def slowly(self: Quantizer, *args: object) -> object:
        time.sleep(0.03)
        return block(self, *args)

    monkeypatch.setattr(Quantizer, "block", slowly)
    fields = {"layer_norm_elementwise_affine": False, "enable_bias": False}
    make_opt(tmp_path / "hf", heads=4, hidden=64, layers=6, ffn=64, vocab=211, **fields)
    text = write_text(tmp_path / "text.json", count=100)
    options = (tmp_path / "hf", *INT4, "--calibrate", text, "--method", method)
    invoke(quantize, *options, "--out", tmp_path / "slow")
    monkeypatch.undo()
    invoke(quantize, *options, "--out", tmp_path / "quick")
    assert content(tmp_path / "slow") == content(tmp_path / "quick")


def _start(options: list[str], root: Path) -> multiprocessing.process.BaseProcess:
    process = _CONTEXT.Process(target=child_command.main, args=("quantize", options, root / "log"))
    process.start()
    return process


def _finish(options: list[str], root: Path) -> float:
    begin = time.monotonic()
    process = _start(options, root)
    process.join()
    assert process.exitcode == 0, (root / "log").read_text()
    return time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_anywhere(made: tuple[Path, Path], method: str, tmp_path: Path) -> None:
    """SIGKILL at random moments of a process, up to three times in a row."""
    root = tmp_path / "whole"
    root.mkdir()
    duration = _finish([*map(str, arguments(made, method, root))], root)
    expected = left(root)
    duration = min(duration, _again(made, method, tmp_path))
    chance, unfinished = random.Random(method), 0
    for number in range(KILLS):
        root = tmp_path / str(number)
        root.mkdir()
        options = [*map(str, arguments(made, method, root))]
        for _ in range(chance.choice((1, 1, 3))):
            process = _start(options, root)
            time.sleep(chance.uniform(0.1, duration * 1.05))
            process.kill()
            process.join()
            unfinished += left(root) not in ({}, expected)
        _finish(options, root)
        assert left(root) == expected
        assert not [name for name in snapshot(root) if "calibration-" in name or name.endswith(".partial")]
    assert unfinished >= KILLS // 4


def _again(made: tuple[Path, Path], method: str, tmp_path: Path) -> float:
    root = tmp_path / "again"
    root.mkdir()
    seconds = _finish([*map(str, arguments(made, method, root))], root)
    shutil.rmtree(root)
    return seconds
