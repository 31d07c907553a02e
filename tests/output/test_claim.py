"""What a run leaves alone, takes the lock of, replaces and goes on with, by the record of what these tools wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest
from invoke import Fill, Killed, invoke, kill, kill_at, refuse
from models import make_model, snapshot

from converters.cli import command as convert
from converters.console.errors import InputError
from converters.files.whole import FileRecord, partial_path, publish, write_partial
from converters.formats.safetensors import SafetensorsWriter
from converters.output import claim as output
from converters.output import preflight
from converters.output.lock import lock
from quantize.cli import command as quantize

# --- the lock


def test_a_lock_that_links_to_a_file_is_not_followed(fill: Fill, tmp_path: Path) -> None:
    command, arguments = fill
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "precious.txt")
    for force in ((), ("--force",)):
        refuse(
            tmp_path, command, *arguments, "--out", tmp_path / "out", *force, says=[".lock", "is no file of this tool"]
        )
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "mine"])
def test_a_lock_of_the_users_own_stays(fill: Fill, content: str, tmp_path: Path) -> None:
    command, arguments = fill
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_text(content)
    invoke(command, *arguments, "--out", tmp_path / "out")
    assert (tmp_path / "out" / ".lock").read_text() == content
    invoke(command, *arguments, "--out", tmp_path / "out", "--force")
    assert (tmp_path / "out" / ".lock").read_text() == content


def test_a_lock_that_a_killed_process_left_is_taken_and_removed(tmp_path: Path) -> None:
    with lock(tmp_path):
        left = (tmp_path / ".lock").read_bytes()
    assert not (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_bytes(left)
    with lock(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_refused_folder_is_not_even_locked(fill: Fill, tmp_path: Path) -> None:
    """Nothing is opened for writing in a folder of somebody else's: its times stay as they are."""
    command, arguments = fill
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    before = (tmp_path / "theirs").stat().st_mtime_ns
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "theirs")
    assert (tmp_path / "theirs").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["config.json", "config.json.partial", ".in-progress.json.partial", "WEIGHTS.partial"])
def test_links_under_names_of_ours_are_not_followed(fill: Fill, name: str, tmp_path: Path) -> None:
    command, arguments = fill
    weights = "model-00001-of-00001.safetensors" if command is convert else "chip-00-of-01.safetensors"
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name.replace("WEIGHTS", weights)).symlink_to(tmp_path / "precious.txt")
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", "--force")
    assert (tmp_path / "precious.txt").read_text() == "mine"


# --- --force


def test_force_removes_only_what_was_written(fill: Fill, tmp_path: Path) -> None:
    """Files with names that the tool might have given, but for this output hasn't."""
    command, arguments = fill
    out = tmp_path / "out"
    invoke(command, *arguments, "--out", out)
    own = ("chat_template.jinja", "tokenizer.model", "chip-01-of-02.safetensors", "model-00002-of-00009.safetensors")
    for name in own:
        (out / name).write_text("mine")
    invoke(command, *arguments, "--layers", 1, "--out", out, "--force")
    for name in own:
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    invoke(command, *arguments, "--layers", 1, "--out", tmp_path / "straight")
    assert snapshot(out) == snapshot(tmp_path / "straight")


def test_force_never_takes_the_name_of_a_file_of_the_users(tmp_path: Path, hf: Path) -> None:
    invoke(quantize, hf, "--int8", "--chips", 2, "--only-chip", 0, "--out", tmp_path / "out")
    (tmp_path / "out" / "chip-01-of-02.safetensors").write_text("from another machine")
    for force in ((), ("--force",)):
        command = (quantize, hf, "--int8", "--chips", 2, "--only-chip", 1, "--out", tmp_path / "out", *force)
        refuse(tmp_path, *command, says=["chip-01-of-02.safetensors was not written by this tool"])


def test_a_single_file_that_readers_would_take_for_the_model(fill: Fill, tmp_path: Path) -> None:
    command, arguments = fill
    invoke(command, *arguments, "--out", tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    changed = (*arguments, "--layers", 1, "--out", tmp_path / "out", "--force")
    refuse(tmp_path, command, *changed, says=["model.safetensors was not written by this tool"])


@pytest.mark.parametrize("command", [convert, quantize])
def test_force_checks_the_disk_before_it_removes(
    command: click.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "hf", hidden=96, ffn=400, layers=4)
    arguments = ("--source", tmp_path / "hf") if command is convert else (tmp_path / "hf", "--int8")
    invoke(command, *arguments, "--layers", 1, "--out", tmp_path / "out")
    usage = type("Usage", (), {"free": 1000, "total": 10**12})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", "--force", says=["1.00 kB are free"])


@pytest.mark.parametrize("at", range(12))
def test_killed_while_force_clears(fill: Fill, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two removals: the same command again goes on, and ends as if nothing had happened."""
    command, arguments = fill
    out = tmp_path / "out"
    (tmp_path / "hf" / "generation_config.json").write_text("{}")
    invoke(command, *arguments, "--out", out)
    (out / "notes.txt").write_text("mine")
    unlink, calls = Path.unlink, []

    def stop(path: Path, missing_ok: bool = False) -> None:
        if path.is_relative_to(out) and path.name != ".lock":
            calls.append(path)
            if len(calls) > at:
                raise Killed
        unlink(path, missing_ok=missing_ok)

    changed = (*arguments, "--layers", 1, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        kill(command, *changed, "--force")
    assert ".in-progress.json" in snapshot(out)
    refuse(tmp_path, command, *arguments, "--out", out, says=["--force"])
    invoke(command, *changed, *(("--force",) if at % 2 else ()))
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    invoke(command, *changed[:-1], tmp_path / "straight")
    assert snapshot(out) == snapshot(tmp_path / "straight")


@pytest.mark.parametrize("name", ["WEIGHTS", "config.json", "MANIFEST"])
def test_files_put_into_an_unfinished_output_are_not_taken_for_ours(fill: Fill, name: str, tmp_path: Path) -> None:
    """Names that were only wanted when the run was killed: neither a rerun nor --force overwrites or removes them."""
    command, arguments = fill
    small = ("--max-shard-size", "2KB") if command is convert else ("--chips", 2)
    _kill_at_weights(command, *arguments, *small, "--out", tmp_path / "out")
    last = "model.safetensors.index.json" if command is convert else "shards.json"
    weights = "model-00003-of-00007.safetensors" if command is convert else "chip-01-of-02.safetensors"
    path = tmp_path / "out" / name.replace("WEIGHTS", weights).replace("MANIFEST", last)
    path.write_text("mine")
    for force in ((), ("--force",)):
        refuse(tmp_path, command, *arguments, *small, "--out", tmp_path / "out", *force, says=[path.name])
    path.unlink()
    invoke(command, *arguments, *small, "--out", tmp_path / "out")
    invoke(command, *arguments, *small, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


def test_a_file_put_there_while_a_run_fails_stays(fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends with bad input takes back what it wrote, and nothing else."""
    command, arguments = fill
    last = "model.safetensors.index.json" if command is convert else "shards.json"

    def fail(self: output.Output) -> None:
        (self.directory / last).write_text("mine")
        raise InputError("The source is bad.")

    monkeypatch.setattr(output.Output, "check_sources", fail)
    invoke(command, *arguments, "--out", tmp_path / "out", exit_code=2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {last}


def test_a_journal_of_the_users_own_stays(fill: Fill, tmp_path: Path) -> None:
    command, arguments = fill
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".journal.json").write_text("mine")
    for force in ((), ("--force",)):
        refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", *force, says=[".journal.json was not written"])


def test_a_folder_in_the_place_of_a_file(fill: Fill, tmp_path: Path) -> None:
    command, arguments = fill
    invoke(command, *arguments, "--out", tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out" / "config.json").mkdir()
    for force in ((), ("--force",)):
        refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", *force, says=["config.json was not written"])


def _kill_at_weights(command: click.Command, *arguments: object) -> None:
    """Run a command that is killed before it records what its files of weights hold."""
    add = output.Output.add

    def stop(self: output.Output, records: dict[str, FileRecord], state: object = None) -> None:
        if any(name.endswith(".safetensors") for name in records):
            raise Killed
        add(self, records, state)

    kill_at(output.Output, "add", command, *arguments, instead=stop)


# --- small files, written together


def _kill_in_small_files(at: int, command: click.Command, *arguments: object) -> None:
    """Run a command that is killed at its call ``at``, from 0, of writing or renaming a small file, half written."""
    calls: list[Path] = []

    def is_last(path: Path) -> bool:
        calls.append(path)
        return len(calls) > at

    def write(path: Path, content: bytes) -> None:
        if is_last(path):
            partial_path(path).write_bytes(content[: len(content) // 2])
            raise Killed
        write_partial(path, content)

    def rename(partial: Path, path: Path) -> None:
        if is_last(path):
            raise Killed
        publish(partial, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "write_partial", write)
        patch.setattr(output, "publish", rename)
        kill(command, *arguments)


@pytest.mark.parametrize("at", range(6))
def test_killed_again_and_again_in_its_small_files(hf: Path, at: int, tmp_path: Path) -> None:
    """The report of the first chip's rows is replaced by that of both: the report, config.json and then shards.json."""
    arguments = (quantize, hf, "--int8", "--chips", 2)
    invoke(*arguments, "--only-chip", 0, "--out", tmp_path / "out")
    second = (*arguments, "--only-chip", 1, "--out", tmp_path / "out")
    _kill_in_small_files(at, *second)
    for again in (0, 1, 0):
        _kill_in_small_files(again, *second)
    invoke(*second)
    invoke(*arguments, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


# --- room on the disk


@pytest.mark.parametrize("stopped_at", ["add", "publish"])
def test_a_rerun_needs_no_room_for_what_is_whole(
    fill: Fill, stopped_at: str, tmp_path: Path, free: Callable[[int], None]
) -> None:
    command, arguments = fill
    arguments = (*arguments, *(("--chips", 3) if command is quantize else ()))
    # All bytes are there, and no file has its name yet; killed before or after their digests are recorded.
    if stopped_at == "add":
        _kill_at_weights(command, *arguments, "--out", tmp_path / "out")
    else:
        kill_at(SafetensorsWriter, "publish", command, *arguments, "--out", tmp_path / "out")
    free(0)
    invoke(command, *arguments, "--out", tmp_path / "out")
    free(10**9)
    invoke(command, *arguments, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")
