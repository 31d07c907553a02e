"""File systems that lack locks, flushing or transfers around the page cache: gone without, and said; else an error."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from invoke import Result, invoke, notes
from models import snapshot, write_hf

from converters.cli import command as convert
from converters.console.errors import InputError
from converters.console.notes import forget_notes, print_notes
from converters.files.file_system import lock, open_direct, sync_file, sync_folder
from converters.files.streams import StreamReader, StreamWriter
from converters.output import preflight
from quantize.cli import command as quantize
from runtime.bench.journal import open_journal

LACKING = ("ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL", "ENOTTY", "EPERM", 524)
FAILING = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE", "ENOMEM")
CONTENT = os.urandom(3_000_001)


@pytest.fixture(autouse=True)
def _no_notes() -> None:
    forget_notes()


def failure(name: str | int) -> OSError:
    number = name if isinstance(name, int) else getattr(errno, name)
    return OSError(number, os.strerror(number))


def printed_notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_notes()
    return capsys.readouterr().err.splitlines()


@pytest.fixture
def descriptor(tmp_path: Path):
    with (tmp_path / "file").open("w") as file:
        yield file.fileno()


def test_a_lock_keeps_others_away(descriptor: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "file").open("w") as other:
        assert lock(descriptor)
        assert not lock(other.fileno())
    assert printed_notes(capsys) == []


@pytest.mark.parametrize("name", [*LACKING, "ENOLCK", "EACCES", "EWOULDBLOCK", *FAILING])
def test_locks(
    name: str | int, descriptor: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: int, operation: int) -> None:
        raise failure(name)

    monkeypatch.setattr(fcntl, "flock", refuse)
    if name in FAILING:
        with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
            lock(descriptor)
        return
    held = name in ("EACCES", "EWOULDBLOCK")  # by another process
    assert [lock(descriptor), lock(descriptor)] == [not held] * 2
    assert len(printed_notes(capsys)) == (0 if held else 1)


@pytest.mark.parametrize("name", [*LACKING, "EBADF", "EACCES", "EISDIR", *FAILING])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_flushing(
    name: str | int,
    call: str,
    descriptor: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*arguments: object) -> None:
        raise failure(name)

    monkeypatch.setattr(os, call, refuse)
    if name in FAILING:
        with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)
        assert len(printed_notes(capsys)) == 1
    if call == "fsync" and name not in LACKING:
        with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
            sync_file(descriptor)
    elif call == "fsync":
        sync_file(descriptor)
        assert len(printed_notes(capsys)) == 1


@pytest.mark.parametrize("name", [*LACKING, "EACCES", "ENOENT"])
def test_direct_opening_that_is_refused(
    name: str | int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the reason; a plain opening that is refused too is the error."""
    plain = os.open

    def refuse(path: object, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise failure(name)
        return plain(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with closing(StreamWriter(tmp_path / "file")) as writer:
        writer.write(CONTENT)
        writer.flush()
    with (tmp_path / "file").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert StreamReader(tmp_path / "file").read(0, len(CONTENT)).numpy().tobytes() == CONTENT
    assert len(printed_notes(capsys)) == 1
    with pytest.raises(FileNotFoundError):
        open_direct(tmp_path / "no" / "file", os.O_RDWR | os.O_CREAT)
    assert printed_notes(capsys) == []


@pytest.mark.parametrize("name", [*LACKING, "EIO", "ENOSPC"])
def test_direct_transfers_that_are_refused(
    name: str | int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pwrite, direct = os.pwrite, []

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(offset)
            raise failure(name)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    with closing(StreamWriter(tmp_path / "file")) as writer:
        if name in LACKING:
            writer.write(CONTENT)
            writer.flush()
            assert (tmp_path / "file").read_bytes() == CONTENT
            assert len(printed_notes(capsys)) == bool(direct)  # none where this very file system has none
        elif fcntl.fcntl(writer.flush(), fcntl.F_GETFL) & os.O_DIRECT:
            writer.write(CONTENT)
            with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
                writer.flush()


def test_a_file_is_never_cut_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page written whole and cut afterwards needs ftruncate, which some object stores lack."""
    monkeypatch.delattr(os, "truncate")
    monkeypatch.delattr(os, "ftruncate")
    with closing(StreamWriter(tmp_path / "file")) as writer:
        for begin, end in ((0, 5000), (5000, 2_500_000), (2_500_000, len(CONTENT))):
            writer.write(CONTENT[begin:end])
            writer.flush()
            assert (tmp_path / "file").read_bytes() == CONTENT[:end]


@pytest.mark.parametrize("call", ["flock", "fsync", "folders"])
def test_commands_go_on_and_say_so_once(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf", files=2)
    lines: list[tuple[object, tuple[object, ...]]] = [
        (convert, ("--source", tmp_path / "hf", "--max-shard-size", "2KB", "--out")),
        (quantize, (tmp_path / "hf", "--int8", "--chips", 2, "--out")),
    ]
    for number, (command, arguments) in enumerate(lines):
        with monkeypatch.context() as patch:
            deny(call, patch)
            said = notes(invoke(command, *arguments, tmp_path / f"without{number}"))
        without = {"flock": ["has no locks"], "folders": ["doesn't flush folders"]}
        without["fsync"] = ["doesn't flush files on request", *without["folders"]]
        assert [line.partition(" (")[0] for line in said] == [f"The file system {w}" for w in without[call]]
        assert notes(invoke(command, *arguments, tmp_path / f"with{number}")) == []
        assert snapshot(tmp_path / f"without{number}") == snapshot(tmp_path / f"with{number}")


def deny(call: str, patch: pytest.MonkeyPatch) -> None:
    """A stand-in for a file system that lacks ``call``; "folders" are those that fsync doesn't take."""
    plain = {"fsync": os.fsync, "flock": fcntl.flock}

    def refuse(descriptor: int, *arguments: int) -> None:
        if call != "folders" or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise failure("EINVAL")
        plain["fsync"](descriptor)

    patch.setattr(fcntl if call == "flock" else os, "flock" if call == "flock" else "fsync", refuse)


def test_a_bench_goes_on_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_journal(tmp_path / "runs", {}, force=False), pytest.raises(InputError, match="Another llama-bench"):  # noqa: SIM117
        with open_journal(tmp_path / "runs", {}, force=False):
            pass
    deny("flock", monkeypatch)
    with open_journal(tmp_path / "runs", {}, force=False):
        pass
    assert len(printed_notes(capsys)) == 1


def test_room_that_is_not_said_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSE without statfs says that 0 of 0 blocks and 0 of 0 names are free."""
    zeros = os.statvfs_result([512, 0, 0, 0, 0, 0, 0, 0, 0, 255])
    monkeypatch.setattr(os, "statvfs", lambda path: zeros)
    said = notes(invoke(convert, "--source", write_hf(tmp_path / "hf"), "--out", tmp_path / "out"))
    assert said == ["The file system doesn't say how much room it has, so that was not checked."]
    assert preflight.free_bytes(tmp_path) > 1 << 50
    forget_notes()
    huge = os.statvfs_result([4096, 4096, 2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 0, 255])
    monkeypatch.setattr(os, "statvfs", lambda path: huge)
    assert notes(invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "other")) == []
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "other")


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>

int flock(int descriptor, int operation) { errno = ENOSYS; return -1; }

int fsync(int descriptor) {
    struct stat status;
    if (fstat(descriptor, &status) == 0 && S_ISDIR(status.st_mode)) { errno = EINVAL; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(descriptor);
}

static int open_as(const char *name, const char *path, int flags, mode_t mode) {
    if (flags & O_DIRECT) { errno = EOPNOTSUPP; return -1; }
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name))(path, flags, mode);
}

#define WITH_MODE mode_t mode; va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest)
int open(const char *path, int flags, ...) { WITH_MODE; return open_as("open", path, flags, mode); }
int open64(const char *path, int flags, ...) { WITH_MODE; return open_as("open64", path, flags, mode); }
"""


def test_a_file_system_that_lacks_them_all(tmp_path: Path) -> None:
    """Below Python, in front of the C library."""
    (tmp_path / "shim.c").write_text(SHIM, "utf-8")
    line = ["cc", "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c", "-ldl"]
    subprocess.run(line, check=True)
    code = "from converters.cli import main; main()"
    arguments = [sys.executable, "-c", code, "--source", write_hf(tmp_path / "hf"), "--out", tmp_path / "without"]
    environment = os.environ | {"LD_PRELOAD": str(tmp_path / "shim.so")}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = notes(Result("", done.stderr))
    assert sorted(line.split("(")[1].split(":")[0] for line in said) == ["O_DIRECT", "flock", "fsync"], said
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "with")
    assert snapshot(tmp_path / "without") == snapshot(tmp_path / "with")
