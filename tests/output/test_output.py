"""What a command leaves alone, replaces, adds to and calls complete: by the record of the files that it wrote."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from invoke import Killed, error_line, invoke, kill, refuse, run_command
from models import make_model, snapshot, write_hf

from converters.cli import command as convert
from converters.console.errors import InputError
from converters.files import whole as files
from converters.output import claim as output
from converters.output import preflight
from converters.output.lock import lock
from quantize.cli import command as quantize
from quantize.report import Report

Fill = tuple[click.Command, tuple[object, ...]]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf")


@pytest.fixture(params=["convert", "quantize"])
def fill(request: pytest.FixtureRequest, hf: Path) -> Fill:
    """A command that writes a directory, with the arguments for its input; --out is left to be given."""
    return (convert, ("--source", hf)) if request.param == "convert" else (quantize, (hf, "--int8"))


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
def test_files_put_into_an_unfinished_output_are_not_taken_for_ours(
    fill: Fill, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that were only wanted when the run was killed: neither a rerun nor --force overwrites or removes them."""
    command, arguments = fill
    small = ("--max-shard-size", "2KB") if command is convert else ("--chips", 2)
    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "add", _stop_at_weights(output.Output.add))
        kill(command, *arguments, *small, "--out", tmp_path / "out")
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
    assert "of the other files there are none" in invoke(convert, "--verify", "--out", out).stdout
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
    with monkeypatch.context() as patch:
        patch.setattr(files.SafetensorsWriter, "finish", _raise_killed)
        kill(command, *arguments, "--out", tmp_path / "out")
    weights = large / "model.safetensors"

    def change(writer: files.SafetensorsWriter) -> files.FileRecord:
        before = weights.stat()
        _change_between_samples(weights)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        return finish(writer)

    finish = files.SafetensorsWriter.finish
    with monkeypatch.context() as patch:
        patch.setattr(files.SafetensorsWriter, "finish", change)
        line = error_line(invoke(command, *arguments, "--out", tmp_path / "out", exit_code=2))
    assert "changed while it was read" in line
    assert "--force" in line
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", says=["a source that has changed since"])
    invoke(command, *arguments, "--out", tmp_path / "out", "--force")
    invoke(command, *arguments, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


@pytest.mark.parametrize("command", [convert, quantize])
def test_a_source_changed_between_a_kill_and_its_rerun(
    large: Path, command: click.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--source", large) if command is convert else (large, "--int8")
    with monkeypatch.context() as patch:
        patch.setattr(files.SafetensorsWriter, "finish", _raise_killed)
        kill(command, *arguments, "--out", tmp_path / "out")
    _change_between_samples(large / "model.safetensors")
    refuse(tmp_path, command, *arguments, "--out", tmp_path / "out", says=["a source that has changed since"])


def _raise_killed(*_: object) -> None:
    raise Killed


def _stop_at_weights(add: Callable[..., None]) -> Callable[..., None]:
    def stop(self: output.Output, records: dict[str, files.FileRecord], state: object = None) -> None:
        if any(name.endswith(".safetensors") for name in records):
            raise Killed
        add(self, records, state)

    return stop


# --- the disk between two runs


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": count, "total": 10**12})
    )


def test_storage_that_was_chosen_stays_chosen(
    hf: Path, tmp_path: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, killed and rerun on a disk that has filled since: no switch to the seed, and no orphans."""
    arguments = ("--config", hf / "config.json", "--max-shard-size", "2KB", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        publish, calls = files.SafetensorsWriter.publish, []

        def stop(writer: files.SafetensorsWriter) -> None:
            calls.append(writer)
            if len(calls) == 3:
                raise Killed
            publish(writer)

        patch.setattr(files.SafetensorsWriter, "publish", stop)
        kill(convert, *arguments)
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


@pytest.mark.parametrize("stopped_at", ["add", "publish"])
def test_a_rerun_needs_no_room_for_what_is_whole(
    fill: Fill, stopped_at: str, tmp_path: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, arguments = fill
    arguments = (*arguments, *(("--chips", 3) if command is quantize else ()))
    with monkeypatch.context() as patch:
        # All bytes are there, and none has its name; before or after it was put down what they hold.
        if stopped_at == "add":
            patch.setattr(output.Output, "add", _stop_at_weights(output.Output.add))
        else:
            patch.setattr(files.SafetensorsWriter, "publish", _raise_killed)
        kill(command, *arguments, "--out", tmp_path / "out")
    free(0)
    invoke(command, *arguments, "--out", tmp_path / "out")
    free(10**9)
    invoke(command, *arguments, "--out", tmp_path / "straight")
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


def test_adding_a_chip_killed_and_rerun(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (quantize, hf, "--int8", "--chips", 2)
    invoke(*arguments, *_chips(0), "--out", tmp_path / "out")
    first = (tmp_path / "out" / "chip-00-of-02.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files.SafetensorsWriter, "finish", _raise_killed)
        kill(*arguments, *_chips(1), "--out", tmp_path / "out")
    refuse(tmp_path, *arguments, "--out", tmp_path / "out", says=["was begun for other files", "--force"])
    assert (tmp_path / "out" / "chip-00-of-02.safetensors").read_bytes() == first
    invoke(*arguments, *_chips(1), "--out", tmp_path / "out")
    invoke(*arguments, "--out", tmp_path / "straight")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


def test_a_chip_file_that_is_gone_is_not_listed_after_a_kill_either(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (quantize, hf, "--int8", "--chips", 2)
    invoke(*arguments, *_chips(0), "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(files.SafetensorsWriter, "finish", _raise_killed)
        kill(*arguments, *_chips(1), "--out", tmp_path / "out")
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


def test_report_adds_up_exactly_in_any_parts() -> None:
    """Against one sum over all rows; 0.1 and its like don't add up in floating point."""
    from quantize.formats.int8 import quantize_rows

    _, errors = quantize_rows(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)))
    part = lambda start, stop: type(errors)(*(values[start:stop] for values in errors))  # noqa: E731
    whole, split = Report(), Report()
    whole.add("a", 0, errors)
    for start, stop in ((200, 300), (0, 50), (20, 120), (0, 50), (100, 210), (290, 300)):
        split.add("a", start, part(start, stop))
        split.restore(json.loads(json.dumps(split.state())))
    assert split.content() == whole.content()
    assert split.state() == whole.state()
    assert whole.state()["a"]["rows"] == [[0, 300]]
