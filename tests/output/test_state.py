"""What an earlier run's output is found to be: complete, changed, of another source, or to be added to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from invoke import Fill, Killed, error_line, invoke, kill_at, refuse, run_command
from models import make_model, snapshot

from converters.cli import command as convert
from converters.files import whole as files
from converters.files.whole import FileRecord
from converters.formats.safetensors import SafetensorsWriter
from quantize.cli import command as quantize

# --- complete, or not


def _damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    else:
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


@pytest.mark.parametrize("how", ["truncated", "longer", "changed"])
@pytest.mark.parametrize("name", ["WEIGHTS", "config.json", "generation_config.json", "MANIFEST"])
def test_a_changed_output_is_not_called_complete(fill: Fill, name: str, how: str, tmp_path: Path) -> None:
    command, arguments = fill
    out = tmp_path / "out"
    (tmp_path / "hf" / "generation_config.json").write_text('{"max_length": 12}')
    invoke(command, *arguments, "--out", out)
    whole = snapshot(out)
    last = "model.safetensors.index.json" if command is convert else "shards.json"
    weights = "model-00001-of-00001.safetensors" if command is convert else "chip-00-of-01.safetensors"
    path = out / name.replace("WEIGHTS", weights).replace("MANIFEST", last)
    _damage(path, how)
    refuse(tmp_path, command, *arguments, "--out", out, says=[path.name, "has changed since it was written", "--force"])
    if name != "MANIFEST":
        refuse(tmp_path, command, "--verify", "--out", out, says=[path.name])
    invoke(command, *arguments, "--out", out, "--force")
    assert snapshot(out) == whole


def test_a_large_file_is_held_against_its_size_and_by_verify_against_its_digest(
    fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, arguments = fill
    monkeypatch.setattr(files, "_SMALL_BYTES", 1000)
    invoke(command, *arguments, "--out", tmp_path / "out")
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    _damage(weights, "changed")
    assert "already complete" in invoke(command, *arguments, "--out", tmp_path / "out").stdout
    line = invoke(command, *arguments, "--out", tmp_path / "out", "--verify", exit_code=2).stderr
    assert weights.name in line
    assert "has changed since it was written" in line
    _damage(weights, "truncated")
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", says=[weights.name, "bytes"])


def test_verify_reads_the_digests_of_a_checkpoint(hf: Path, tmp_path: Path) -> None:
    """Those of its record, or without that, of its index; a checkpoint without either is refused."""
    out = tmp_path / "out"
    said = invoke(convert, "--source", hf, "--max-shard-size", "2KB", "--out", out, "--verify").stdout
    assert "every digest as it was written" in said
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 1
    assert index["metadata"]["files"] == {
        name: {
            "bytes": (out / name).stat().st_size,
            "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(),
        }
        for name in names
    }
    (out / ".written.json").unlink()
    assert "the other files have no digests" in invoke(convert, "--verify", "--out", out).stdout
    _damage(out / names[1], "changed")
    refuse(tmp_path, convert, "--verify", "--out", out, says=[names[1]])
    del index["metadata"]["files"]
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(tmp_path, convert, "--verify", "--out", out, says=["keeps no digests"])
    refuse(tmp_path, convert, "--verify", "--out", tmp_path / "none", says=["is no directory"])


def test_a_seed_is_two_files_that_know_each_other(tmp_path: Path) -> None:
    """config.json by its digest in random_init.json; there is no record beside them."""
    arguments = ("--config", "tiny", "--storage", "seed", "--out", tmp_path / "out")
    invoke(convert, *arguments)
    whole = snapshot(tmp_path / "out")
    assert sorted(whole) == ["config.json", "random_init.json"]
    assert "already complete" in invoke(convert, *arguments, "--verify").stdout
    seed = tmp_path / "out" / "random_init.json"
    seed.write_text(seed.read_text().replace('"seed": 0', '"seed": 1'))
    refuse(tmp_path, convert, *arguments, says=["was made with another source", "--force"])
    refuse(tmp_path, convert, "--verify", "--out", tmp_path / "out", says=["it stands for other weights"])
    invoke(convert, *arguments, "--force")
    _damage(tmp_path / "out" / "config.json", "changed")
    refuse(tmp_path, convert, *arguments, says=["config.json", "has changed since it was written", "--force"])
    refuse(tmp_path, convert, "--verify", "--out", tmp_path / "out", says=["config.json"])
    invoke(convert, *arguments, "--force")
    assert snapshot(tmp_path / "out") == whole


# --- the source


def _change_between_samples(path: Path) -> None:
    """One bit, in a place that the fingerprint doesn't look at; the size stays."""
    with path.open("r+b") as file:
        place = path.stat().st_size - 4096 - 100
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A source with pages that the fingerprint doesn't sample."""
    make_model(tmp_path / "large", hidden=64, layers=2, vocab=8000, heads=4)
    return tmp_path / "large"


@pytest.mark.parametrize("command", [convert, quantize])
def test_a_source_changed_after_finishing(large: Path, command: click.Command, tmp_path: Path) -> None:
    """190 pages lie between the sampled ones; whoever changes one changes the file's time."""
    arguments = ("--source", large) if command is convert else (large, "--int8")
    invoke(command, *arguments, "--out", tmp_path / "out")
    assert "already complete" in invoke(command, *arguments, "--out", tmp_path / "out").stdout
    _change_between_samples(large / "model.safetensors")
    refuse(
        tmp_path, command, *arguments, "--out", tmp_path / "out", says=["a source that has changed since", "--force"]
    )
    invoke(command, *arguments, "--out", tmp_path / "out", "--force")
    invoke(command, *arguments, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


@pytest.mark.parametrize("command", [convert, quantize])
@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_source_changed_while_it_is_read(
    large: Path, command: click.Command, keeps_time: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that has been read already, and again with its time set back: nothing is finished of it."""
    arguments = ("--source", large) if command is convert else (large, "--int8")
    weights, isfinite, calls = large / "model.safetensors", torch.Tensor.isfinite, []

    def change(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) == 5:
            before = weights.stat()
            _change_between_samples(weights)
            if keeps_time:
                os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        return isfinite(tensor)

    monkeypatch.setattr(torch.Tensor, "isfinite", change)
    status, result = run_command(command, *arguments, "--out", tmp_path / "out")
    assert status == 2
    assert "changed while it was read" in error_line(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [convert, quantize])
def test_a_source_changed_while_a_rerun_reads_it(
    large: Path, command: click.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its time set back: what the first run made stays, and no rerun goes on with it."""
    arguments = ("--source", large) if command is convert else (large, "--int8")
    kill_at(SafetensorsWriter, "finish", command, *arguments, "--out", tmp_path / "out")
    weights = large / "model.safetensors"

    def change(writer: SafetensorsWriter) -> FileRecord:
        before = weights.stat()
        _change_between_samples(weights)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        return finish(writer)

    finish = SafetensorsWriter.finish
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "finish", change)
        line = error_line(invoke(command, *arguments, "--out", tmp_path / "out", exit_code=2))
    assert "changed while it was read" in line
    assert "--force" in line
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", says=["a source that has changed since"])
    invoke(command, *arguments, "--out", tmp_path / "out", "--force")
    invoke(command, *arguments, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


@pytest.mark.parametrize("command", [convert, quantize])
def test_a_source_changed_between_a_kill_and_its_rerun(large: Path, command: click.Command, tmp_path: Path) -> None:
    arguments = ("--source", large) if command is convert else (large, "--int8")
    kill_at(SafetensorsWriter, "finish", command, *arguments, "--out", tmp_path / "out")
    _change_between_samples(large / "model.safetensors")
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", says=["a source that has changed since"])


# --- the disk between two runs


def test_storage_that_was_chosen_stays_chosen(hf: Path, tmp_path: Path, free: Callable[[int], None]) -> None:
    """Files, killed and rerun on a disk that has filled since: no switch to the seed, and no orphans."""
    arguments = ("--config", hf / "config.json", "--max-shard-size", "2KB", "--out", tmp_path / "out")
    publish, calls = SafetensorsWriter.publish, []

    def stop(writer: SafetensorsWriter) -> None:
        calls.append(writer)
        if len(calls) == 3:
            raise Killed
        publish(writer)

    kill_at(SafetensorsWriter, "publish", convert, *arguments, instead=stop)
    free(2000)
    refuse(tmp_path, convert, *arguments, says=["2.00 kB are free there"])
    free(10**9)
    assert "Kept the seed" not in invoke(convert, *arguments).stdout
    free(10)
    assert "already complete" in invoke(convert, *arguments).stdout
    invoke(convert, *arguments[:-1], tmp_path / "seed")
    assert "random_init.json" in snapshot(tmp_path / "seed")
    free(10**9)
    assert "already complete" in invoke(convert, *arguments[:-1], tmp_path / "seed").stdout
    invoke(convert, *arguments[:-1], tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


# --- chip by chip


def _chips(*numbers: int) -> tuple[object, ...]:
    return tuple(argument for number in numbers for argument in ("--only-chip", number))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_chips_one_after_another_end_as_all_at_once(order: tuple[int, ...], tmp_path: Path) -> None:
    """Padded heads and repeated KV heads: every row is in the report once."""
    make_model(tmp_path / "hf", heads=4, kv_heads=2, hidden=48, head_dim=16, layers=2, ffn=44, vocab=101)
    arguments = (quantize, tmp_path / "hf", "--int8", "--chips", 3)
    for count, chip in enumerate(order, 1):
        said = invoke(*arguments, *_chips(chip), "--out", tmp_path / "out").stdout
        assert "already complete" not in said
        assert len(json.loads((tmp_path / "out" / "shards.json").read_text())["files"]) == count
    assert "already complete" in invoke(*arguments, *_chips(1), "--out", tmp_path / "out").stdout
    assert "already complete" in invoke(*arguments, "--out", tmp_path / "out").stdout
    invoke(*arguments, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


def test_the_rest_of_the_chips_at_once(hf: Path, tmp_path: Path) -> None:
    arguments = (quantize, hf, "--int8", "--chips", 4)
    invoke(*arguments, *_chips(2), "--out", tmp_path / "out")
    first = (tmp_path / "out" / "chip-02-of-04.safetensors").stat()
    invoke(*arguments, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "chip-02-of-04.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    invoke(*arguments, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


def test_a_chip_file_that_was_carried_away_is_not_missed(hf: Path, tmp_path: Path) -> None:
    """On a small disk each file is moved off before the next one is made."""
    arguments = (quantize, hf, "--int8", "--chips", 2)
    invoke(*arguments, *_chips(0), "--out", tmp_path / "out")
    (tmp_path / "out" / "chip-00-of-02.safetensors").rename(tmp_path / "carried")
    invoke(*arguments, *_chips(1), "--out", tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "shards.json").read_text())["files"]) == ["chip-01-of-02.safetensors"]
    invoke(*arguments, "--out", tmp_path / "out")
    assert (tmp_path / "carried").read_bytes() == (tmp_path / "out" / "chip-00-of-02.safetensors").read_bytes()
    invoke(*arguments, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


def test_force_for_one_chip_keeps_the_others(hf: Path, tmp_path: Path) -> None:
    arguments = (quantize, hf, "--int8", "--chips", 2)
    invoke(*arguments, "--out", tmp_path / "out")
    whole = snapshot(tmp_path / "out")
    kept = (tmp_path / "out" / "chip-00-of-02.safetensors").stat().st_mtime_ns
    made = (tmp_path / "out" / "chip-01-of-02.safetensors").stat().st_mtime_ns
    invoke(*arguments, *_chips(1), "--out", tmp_path / "out", "--force")
    assert (tmp_path / "out" / "chip-00-of-02.safetensors").stat().st_mtime_ns == kept
    assert (tmp_path / "out" / "chip-01-of-02.safetensors").stat().st_mtime_ns != made
    assert snapshot(tmp_path / "out") == whole


def test_adding_a_chip_killed_and_rerun(hf: Path, tmp_path: Path) -> None:
    arguments = (quantize, hf, "--int8", "--chips", 2)
    invoke(*arguments, *_chips(0), "--out", tmp_path / "out")
    first = (tmp_path / "out" / "chip-00-of-02.safetensors").read_bytes()
    kill_at(SafetensorsWriter, "finish", *arguments, *_chips(1), "--out", tmp_path / "out")
    refuse(tmp_path, *arguments, "--out", tmp_path / "out", says=["was begun for other files", "--force"])
    assert (tmp_path / "out" / "chip-00-of-02.safetensors").read_bytes() == first
    invoke(*arguments, *_chips(1), "--out", tmp_path / "out")
    invoke(*arguments, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


def test_a_chip_file_that_is_gone_is_not_listed_after_a_kill_either(hf: Path, tmp_path: Path) -> None:
    arguments = (quantize, hf, "--int8", "--chips", 2)
    invoke(*arguments, *_chips(0), "--out", tmp_path / "out")
    kill_at(SafetensorsWriter, "finish", *arguments, *_chips(1), "--out", tmp_path / "out")
    (tmp_path / "out" / "chip-00-of-02.safetensors").unlink()
    invoke(*arguments, *_chips(1), "--out", tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "shards.json").read_text())["files"]) == ["chip-01-of-02.safetensors"]
    assert "every digest" in invoke(quantize, "--verify", "--out", tmp_path / "out").stdout


@pytest.mark.parametrize("name", ["config.json", "quantization_report.json", "tokenizer.json"])
def test_shards_whose_small_files_changed_are_another_source(hf: Path, name: str, tmp_path: Path) -> None:
    invoke(quantize, hf, "--int8", "--chips", 2, "--out", tmp_path / "two")
    arguments = (quantize, tmp_path / "two", "--int8", "--chips", 3)
    invoke(*arguments, *_chips(0), "--out", tmp_path / "three")
    path = tmp_path / "two" / name
    path.write_text(path.read_text().replace("10000.0", "77777.0") + "\n" if path.exists() else "{}")
    refuse(tmp_path, *arguments, *_chips(1), "--out", tmp_path / "three", says=["a source that has changed since"])
