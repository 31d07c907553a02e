"""Outputs that are refused, what --force may and may not touch, and what is left when a command fails on its way."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from invoke import Fill, invoke, invoke_error, refuse
from models import random_tensors, snapshot, write_hf

from converters.cli import command as convert
from quantize.cli import command as quantize

# --- the output is the input


@pytest.mark.parametrize("name", ["hf", "hf/", "link", "other/../hf"])
def test_output_is_the_input(fill: Fill, name: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    (tmp_path / "other").mkdir()
    command, arguments = fill
    for force in ((), ("--force",)):
        refuse(tmp_path, command, *arguments, "--out", f"{tmp_path}/{name}", *force, says=["an input is never changed"])


def test_output_is_where_the_gguf_file_is(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.gguf").write_bytes(b"GGUF")
    arguments = ("--source", tmp_path / "models" / "m.gguf", "--out", tmp_path / "models", "--force")
    refuse(tmp_path, convert, *arguments, says=["an input is never changed"])


@pytest.mark.parametrize("name", ["config.json", ""])
def test_output_is_where_the_configuration_is(name: str, tmp_path: Path) -> None:
    """--force on a directory of our own would replace the config.json that was given."""
    invoke(convert, "--config", "tiny", "--storage", "seed", "--out", tmp_path / "own")
    arguments = ("--config", tmp_path / "own" / name, "--storage", "seed", "--seed", 9, "--out", tmp_path / "own")
    refuse(tmp_path, convert, *arguments, "--force", says=["an input is never changed"])


def test_a_folder_named_like_a_preset_is_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        said = invoke(convert, "--config", "tiny", "--storage", "seed", "--out", "tiny").stdout
    assert "already complete" in said


# --- the output exists


def test_folder_of_someone_else(fill: Fill, tmp_path: Path) -> None:
    command, arguments = fill
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", says=[str(tmp_path / "out"), "--force"])
    invoke(command, *arguments, "--out", tmp_path / "out", "--force")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_model_of_someone_else(fill: Fill, force: tuple[str, ...], tmp_path: Path) -> None:
    """It bears the names of our output, and is not ours: not even --force may cost anyone their model."""
    write_hf(tmp_path / "precious", files=2)
    (tmp_path / "precious" / "tokenizer.json").write_text("{}")
    command, arguments = fill
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "precious", *force, says=["precious"])


def test_a_command_replaces_only_its_own_output(fill: Fill, tmp_path: Path) -> None:
    command, arguments = fill
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "checkpoint")
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "shards")
    foreign = tmp_path / ("shards" if command is convert else "checkpoint")
    refuse(tmp_path, command, *arguments, "--out", foreign, "--force", says=[str(foreign)])


OTHER_ARGUMENTS = {
    "convert": [("--dtype", "float32"), ("--layers", 1), ("--max-shard-size", "2KB")],
    "quantize": [("--chips", 2), ("--layers", 1), ("--quantize-lm-head",), ("--chips", 2, "--only-chip", 1)],
}


@pytest.mark.parametrize("other", range(4))
def test_other_arguments(fill: Fill, other: int, tmp_path: Path) -> None:
    """Refused; with --force the output is as if it had been made that way at once, and notes stay."""
    command, arguments = fill
    choices = OTHER_ARGUMENTS[command.callback.__module__.split(".")[0].replace("converters", "convert")]
    changed = choices[other % len(choices)]
    invoke(command, *arguments, "--out", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refuse(tmp_path, command, *arguments, *changed, "--out", tmp_path / "out", says=["other arguments", "--force"])
    invoke(command, *arguments, *changed, "--out", tmp_path / "out", "--force")
    (tmp_path / "out" / "notes.txt").unlink()
    invoke(command, *arguments, *changed, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


def test_another_source(tmp_path: Path, hf: Path) -> None:
    invoke(convert, "--source", hf, "--out", tmp_path / "out")
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_hf(tmp_path / "hf2", tensors)
    refuse(tmp_path, convert, "--source", tmp_path / "hf2", "--out", tmp_path / "out", says=["another source"])


@pytest.mark.parametrize("damage", ["{", "[]", '{"format_version": 1}', '{"metadata": 3}', '{"metadata": {}}'])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "earlier version"])
def test_damaged_manifest_of_a_finished_output(fill: Fill, damage: str, recorded: bool, tmp_path: Path) -> None:
    """What can't be read can't be called complete; --force makes anew what is surely ours, and nothing else."""
    command, arguments = fill
    invoke(command, *arguments, "--out", tmp_path / "out")
    whole = snapshot(tmp_path / "out")
    record = tmp_path / "out" / ("model.safetensors.index.json" if command is convert else "shards.json")
    record.write_text(damage)
    if not recorded:
        (tmp_path / "out" / ".written.json").unlink()
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", says=["--force"])
    if recorded:
        invoke(command, *arguments, "--out", tmp_path / "out", "--force")
        assert snapshot(tmp_path / "out") == whole
    else:  # files that any tool may have written
        refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", "--force", says=[str(tmp_path / "out")])


def test_missing_files_of_a_finished_output_are_written_again(fill: Fill, tmp_path: Path) -> None:
    command, arguments = fill
    invoke(command, *arguments, "--out", tmp_path / "out")
    whole = snapshot(tmp_path / "out")
    for name in whole:
        if name != ".written.json":
            (tmp_path / "out" / name).unlink()
    assert "already complete" not in invoke(command, *arguments, "--out", tmp_path / "out").stdout
    assert snapshot(tmp_path / "out") == whole


def test_output_of_an_earlier_version(fill: Fill, tmp_path: Path) -> None:
    """It kept no record: complete where its files are there; --force replaces those that are known to be ours."""
    command, arguments = fill
    invoke(command, *arguments, "--out", tmp_path / "out")
    (tmp_path / "out" / ".written.json").unlink()
    before = snapshot(tmp_path / "out")
    assert "already complete" in invoke(command, *arguments, "--out", tmp_path / "out").stdout
    assert snapshot(tmp_path / "out") == before
    refuse(tmp_path, command, *arguments, "--layers", 1, "--out", tmp_path / "out", says=["layers 2, now 1", "--force"])
    invoke(command, *arguments, "--layers", 1, "--out", tmp_path / "out", "--force")
    invoke(command, *arguments, "--layers", 1, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


@pytest.mark.parametrize(
    "record", ["{}", "{", "[]", '{"source_fingerprint": "0"}', '{"format_version": 1, "files": 3}']
)
def test_damaged_record_of_an_unfinished_output(fill: Fill, record: str, tmp_path: Path) -> None:
    """Nobody knows whose the files are then: nothing is taken or removed, whatever is forced."""
    command, arguments = fill
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".in-progress.json").write_text(record)
    (tmp_path / "out" / "chip-00-of-01.safetensors").write_bytes(b"other")
    (tmp_path / "out" / "model-00001-of-00001.safetensors.partial").write_bytes(b"other")
    for force in ((), ("--force",)):
        says = [".in-progress.json is damaged", "Move it away"]
        refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", *force, says=says)
    (tmp_path / "out" / ".in-progress.json").unlink()
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", "--force", says=["was not written by this tool"])


def test_another_process_is_writing(fill: Fill, tmp_path: Path) -> None:
    command, arguments = fill
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", says=["Another process"])


# --- the output can't be written


def test_output_is_a_file(fill: Fill, tmp_path: Path) -> None:
    command, arguments = fill
    (tmp_path / "out").write_text("mine")
    for force in ((), ("--force",)):
        refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", *force, says=["is a file"])
        refuse(tmp_path, command, *arguments, "--out", tmp_path / "out" / "below", *force, says=["Not a directory"])


def test_output_in_a_directory_that_takes_no_files(fill: Fill, tmp_path: Path) -> None:
    command, arguments = fill
    line = invoke_error(command, *arguments, "--out", "/proc/none")
    assert "/proc/none" in line
    assert not os.path.exists("/proc/none")


def test_no_room(fill: Fill, tmp_path: Path, free: Callable[[int], None]) -> None:
    command, arguments = fill
    free(3000)
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "a" / "b", says=["3.00 kB are free", "larger disk"])
    free(10**6)
    invoke(command, *arguments, "--out", tmp_path / "out")
    free(0)
    assert "already complete" in invoke(command, *arguments, "--out", tmp_path / "out").stdout


def test_room_of_a_smaller_file_is_not_enough(hf: Path, tmp_path: Path, free: Callable[[int], None]) -> None:
    """The file to be replaced has the name of the new one, and half its size."""
    invoke(convert, "--source", hf, "--out", tmp_path / "out")
    free(3000)
    arguments = ("--source", hf, "--out", tmp_path / "out", "--dtype", "float32", "--force")
    refuse(tmp_path, convert, *arguments, says=["free there"])


# --- a failure on the way


def test_bad_value_late_in_the_model_leaves_nothing(fill: Fill, tmp_path: Path) -> None:
    """Neither the files that were already whole, nor the folders made for them."""
    tensors = random_tensors()
    tensors["lm_head.weight"][-1, -1] = float("nan")
    write_hf(tmp_path / "hf", tensors)
    command, arguments = fill
    small = ("--max-shard-size", "1KB") if command is convert else ("--chips", 3)
    refuse(tmp_path, command, *arguments, *small, "--out", tmp_path / "a" / "b" / "out", says=["lm_head.weight"])
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    refuse(tmp_path, command, *arguments, *small, "--out", tmp_path / "kept", "--force", says=["lm_head.weight"])


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_interruption_keeps_what_a_rerun_goes_on_with(
    fill: Fill, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished directory is no input; the same command again makes it whole."""
    command, arguments = fill
    arguments = (*arguments, *(("--max-shard-size", "2KB") if command is convert else ()), "--out")
    with monkeypatch.context() as patch:
        rows, calls = torch.Tensor.isfinite, []

        def stop(tensor: torch.Tensor) -> torch.Tensor:
            calls.append(tensor)
            if len(calls) == 9:
                raise error
            return rows(tensor)

        patch.setattr(torch.Tensor, "isfinite", stop)
        line = invoke(
            command, *arguments, tmp_path / "out", exit_code=130 if isinstance(error, KeyboardInterrupt) else 2
        ).stderr
    assert len(line.strip().splitlines()) == 1
    assert "run the same command again" in line.lower()
    left = snapshot(tmp_path / "out")
    assert ".in-progress.json" in left
    assert not [name for name in left if name.endswith((".lock", "index.json", "shards.json"))]
    if command is convert:
        kept = tmp_path / "out" / sorted(name for name in left if name.startswith("model-"))[0]
        written = kept.stat().st_mtime_ns
    refuse(tmp_path, quantize, tmp_path / "out", "--int8", "--out", tmp_path / "further", says=["unfinished"])
    assert "already complete" not in invoke(command, *arguments, tmp_path / "out").stdout
    if command is convert:
        assert kept.stat().st_mtime_ns == written
    invoke(command, *arguments, tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")
