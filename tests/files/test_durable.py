"""What survives a power cut and what a rerun does not do again: every flush seen, every byte counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import get_ident
from typing import Any

import click
import pytest
import torch
from invoke import Killed, invoke, kill
from models import make_model, snapshot

from converters.cli import command as convert
from converters.files import row_blocks
from converters.formats.safetensors import SafetensorsWriter
from converters.output import journal
from quantize.cli import command as quantize

Run = tuple[click.Command, tuple[object, ...]]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks a tensor, and a journal that is written after every few tensors, without running behind."""
    note = journal.Journal.note

    def note_and_wait(self: journal.Journal, writers: dict[str, SafetensorsWriter], *what: Any, **how: Any) -> None:
        note(self, writers, *what, **how)
        self.wait()

    monkeypatch.setattr(journal.Journal, "note", note_and_wait)
    monkeypatch.setattr(journal, "SYNC_BYTES", 20_000)
    monkeypatch.setattr(row_blocks.row_blocks, "__defaults__", (2048,))


@pytest.fixture(params=["convert", "quantize", "reshard"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """A command with its arguments, --out left to be given: several files one after another, or at once."""
    make_model(tmp_path / "hf", heads=6, kv_heads=2, hidden=48, head_dim=16, layers=4, ffn=172, vocab=515)
    if request.param == "convert":
        return convert, ("--source", tmp_path / "hf", "--max-shard-size", "80KB")
    if request.param == "quantize":
        return quantize, (tmp_path / "hf", "--int8", "--chips", 4)
    invoke(quantize, tmp_path / "hf", "--int8", "--chips", 2, "--out", tmp_path / "two")
    return quantize, (tmp_path / "two", "--int8", "--chips", 3)


class _Counted:
    """Bytes of values that were appended to files; with ``limit`` the process ends where they exceed it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: float = float("inf")) -> None:
        self.bytes = 0
        append = SafetensorsWriter.append

        def counted(writer: SafetensorsWriter, block: torch.Tensor) -> None:
            if self.bytes > limit:
                raise Killed
            self.bytes += block.nbytes
            append(writer, block)

        monkeypatch.setattr(SafetensorsWriter, "append", counted)


def _values(path: Path, stop: int | None = None) -> int:
    """Bytes of values in a safetensors file, up to byte ``stop`` of it."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little") + 8
    return (path.stat().st_size if stop is None else stop) - header


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_rerun_does_not_do_again_what_was_flushed(run: Run, share: float, tmp_path: Path) -> None:
    """The rerun makes exactly the bytes behind the journal's position, and that is not the beginning."""
    command, arguments = run
    with pytest.MonkeyPatch.context() as patch:
        total = _Counted(patch)
        invoke(command, *arguments, "--out", tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        _Counted(patch, share * total.bytes)
        kill(command, *arguments, "--out", out)
    positions = json.loads((out / ".journal.json").read_text())["positions"]
    kept = sum(map(_values, out.glob("*.safetensors")))
    kept += sum(
        _values(out / (name + ".partial"), stop) for name, stop in positions.items() if not (out / name).exists()
    )
    assert kept > share / 2 * total.bytes
    with pytest.MonkeyPatch.context() as patch:
        rest = _Counted(patch)
        invoke(command, *arguments, "--out", out)
    assert rest.bytes == total.bytes - kept
    assert snapshot(out) == snapshot(tmp_path / "whole")


@pytest.mark.usefixtures("small_steps")
def test_files_that_are_whole_are_not_made_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended when the third file is whole and has no name yet: the rerun names it, and makes only what follows."""
    command, arguments = run
    replace, files = os.replace, []

    def stop(partial: Path, path: Path) -> None:
        if Path(path).suffix == ".safetensors":
            files.append(Path(path).name)
        if len(files) == 3:
            raise Killed
        replace(partial, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        kill(command, *arguments, "--out", tmp_path / "out")
    rest = _Counted(monkeypatch)
    invoke(command, *arguments, "--out", tmp_path / "out")
    later = [path for path in (tmp_path / "out").glob("model-*.safetensors") if path.name not in files]
    assert rest.bytes == sum(map(_values, later))
    assert bool(later) == (command is convert)  # files of chips are all written at once


class _Disk:
    """What the disk is sure to hold, by inode: bytes that were flushed, and folders whose new names were not."""

    def __init__(self) -> None:
        self._flushed: dict[int, int] = {}  # size at the last flush, gone once something is written behind it
        self._ever_flushed: dict[int, int] = {}
        self.published: list[str] = []
        self.unflushed_names: dict[tuple[int, int], str] = {}  # by thread and folder
        self._pwrite, self._replace, self._fsync = os.pwrite, os.replace, os.fsync

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        self._flushed.pop(os.fstat(descriptor).st_ino, None)
        return self._pwrite(descriptor, data, offset)

    def fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self._flushed[status.st_ino] = status.st_size
        self._ever_flushed[status.st_ino] = max(self._ever_flushed.get(status.st_ino, 0), status.st_size)
        self.unflushed_names.pop((get_ident(), status.st_ino), None)
        self._fsync(descriptor)

    def replace(self, partial: Path, path: Path) -> None:
        status = os.stat(partial)
        assert self._flushed.get(status.st_ino) == status.st_size, f"{path.name} is named before its bytes are safe"
        folder = (get_ident(), path.parent.stat().st_ino)
        assert folder not in self.unflushed_names, f"{path.name} is named before {self.unflushed_names[folder]} is safe"
        if path.name == ".journal.json":
            self._check_positions(path.parent, json.loads(Path(partial).read_text())["positions"])
        self._replace(partial, path)
        self.published.append(path.name)
        self.unflushed_names[folder] = path.name

    def _check_positions(self, folder: Path, positions: dict[str, int]) -> None:
        for name, position in positions.items():
            safe = self._ever_flushed.get((folder / (name + ".partial")).stat().st_ino, 0)
            assert safe >= position, f"the journal relies on {position} bytes of {name}, of which {safe} are safe"


@pytest.mark.usefixtures("small_steps")
def test_nothing_is_relied_on_before_it_is_on_the_disk(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes before the name, the name before the next file, the bytes behind every position of the journal."""
    disk = _Disk()
    command, arguments = run
    for call in ("pwrite", "fsync", "replace"):
        monkeypatch.setattr(os, call, getattr(disk, call))
    invoke(command, *arguments, "--out", tmp_path / "out")
    assert not disk.unflushed_names
    assert {".journal.json", "config.json"} <= set(disk.published)
    last = "model.safetensors.index.json" if command is convert else "shards.json"
    assert disk.published[-2:] == [last, ".written.json"]
    weights = [name for name in disk.published if name.endswith(".safetensors")]
    assert sorted(weights) == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
