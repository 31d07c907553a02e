"""A folder of compiled programs: what one process has compiled, a later one loads, on this machine or another.

A program is kept under a key of all that it was made of: the traced graph, the mesh, the compiler's settings and
versions, and on the CPU the processor. What differs in any of them is never loaded. A file has

    magic, 16 bytes; then big-endian the format's number, 4; the length of what follows the digest, 8; its sha256, 32
    the length of the description, 8; the description, JSON with the key; the program; the compiler's text, compressed

so what is damaged or not ours is found before any of it is used. Beyond that, loading a program is trusting whoever
wrote it: it is machine code in a pickle. So folder and files must belong to this user or to root, and be writable by no
one else.

The text and the sizes of a program for a TPU are kept beside it for llama-plan, which compiles for chips that are not
there: without one, jax can't load such a program to ask it for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError, shown
from converters.console.notes import note
from converters.files.whole import json_bytes, replace_file

if TYPE_CHECKING:
    import torch

    from runtime.devices.backend import CacheUse
    from runtime.devices.pjrt import Mesh, Program
    from runtime.devices.tracing import TracedGraph, TracedTensor

_MAGIC = b"LLAMA-TPU-PROG\r\n"  # a transfer as text would change its end
_FORMAT = 1  # another one for any change of the file or of what a key means
_HEAD = struct.Struct(">16sIQ32s")
_LENGTH = struct.Struct(">Q")
_SUFFIX = ".program"
_RECIPES_SUFFIX = ".recipes"
_THREADS = "NPROC"  # by which XLA:CPU cuts loops into parts
_SIZES = ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_folder(folder: Path, needs_writing: bool = False) -> None:
    """Make the folder of a compile cache, for this user alone, or check one that is there, and the programs in it.

    Raises InputError where it can't be made, or where others could have written what would be loaded from it; with
    ``needs_writing`` also where this process can't write into it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (_SUFFIX, _RECIPES_SUFFIX)]
        programs = [(path, path.lstat()) for path in files]
    except OSError:
        found = None
    if found is None or (needs_writing and not os.access(folder, os.W_OK)):
        raise InputError(f"The folder {folder} can't be made or written into. Give another.")
    _check_owner(folder, found)
    for path, status in programs:
        if stat.S_ISREG(status.st_mode):
            _check_owner(path, status)


def _check_owner(path: Path, status: os.stat_result) -> None:
    """Raise InputError where others than this user and root may have written to a folder or file."""
    if status.st_uid not in (os.geteuid(), 0):
        raise InputError(
            f"{path} belongs to another user, whose programs would be run: give --compile-cache a folder of your own."
        )
    if status.st_mode & _OTHERS_WRITE:
        raise InputError(
            f"{path} can be written by others, whose programs would be run: chmod go-w {path}, if you trust what is in "
            "it, or give another --compile-cache."
        )


@dataclass(frozen=True)
class Kept:
    """A program as a file holds it."""

    description: dict[str, Any]
    program: bytes  # what ``Mesh.load`` takes
    text: bytes  # the compiler's, compressed; empty for other devices than TPUs


@dataclass(frozen=True)
class Report:
    """What llama-plan asks about a program for a TPU: bytes per chip, the compiler's text, the time it took."""

    text: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    compile_s: float


class _Unusable(Exception):
    """A file that holds no program for a key; ``ours`` where it is one of a cache's own, which is replaced."""

    def __init__(self, why: str, ours: bool) -> None:
        super().__init__(why)
        self.ours = ours


class CompileCache:
    """The programs for one mesh in a folder, and how many of those asked for were found there."""

    def __init__(self, folder: Path, mesh: Mesh, options: Mapping[str, Any] | None = None) -> None:
        """``options`` are the compiler's settings, as ``Mesh.compile`` takes them. Raises InputError as
        ``check_folder`` does.
        """
        check_folder(folder)
        self._folder, self._mesh, self._options = folder, mesh, options
        self._circumstances = _circumstances(mesh, options)
        self._hits = self._misses = self._failures = 0

    @property
    def use(self) -> CacheUse:
        from runtime.devices.backend import CacheUse

        return CacheUse(self._hits, self._misses, self._failures)

    def program(self, graph: TracedGraph, name: str) -> Program:
        """The graph's program, loaded or else compiled and kept; ``name`` says in a file what it is."""
        kept, replaces = self._find(graph)
        if kept is not None:
            try:
                program = self._mesh.load(kept.program, graph.order, len(graph.donated))
            except Exception as error:  # the runtime's own, for a program of another version for instance
                self._fail(self._path(graph), str(error).strip().split("\n", 1)[0])
            else:
                self._hits += 1
                return program
        return self._compile(graph, name, replaces)[0]

    def report(self, graph: TracedGraph, name: str) -> Report:
        """What the compiler says of the graph, found or else compiled and kept. Nothing is loaded."""
        kept, replaces = self._find(graph)
        if kept is not None:
            self._hits += 1
            text, description = zlib.decompress(kept.text).decode(), kept.description
        else:
            program, description = self._compile(graph, name, replaces)
            text = program.text
        return Report(text, *(description[size] for size in _SIZES), description["compile_s"])

    def _find(self, graph: TracedGraph) -> tuple[Kept | None, bool]:
        """The file of a graph, if it is there and whole, and whether another may take its place."""
        path, key = self._path(graph), self._key(graph)
        try:
            return _read(path, key), True
        except FileNotFoundError:
            self._misses += 1
            self._say_what_differs(graph)
            return None, True
        except OSError as error:
            self._fail(path, error.strerror or str(error))
            return None, False
        except _Unusable as error:
            self._fail(path, str(error), error.ours)
            return None, error.ours

    def _fail(self, path: Path, why: str, replaced: bool = True) -> None:
        self._failures += 1
        then = "compiled anew" if replaced else "compiled and not kept; the file is left as it is"
        note(f"{path} can't be loaded ({why}): {then}.")

    def load(self, name: str, order: Sequence[int], donated: int) -> Program:
        """The program in the file of this name, which ``file_name`` gave for it, with what ``Program`` takes besides.

        Nothing is counted or said. Raises an error of any kind where it can't be loaded.
        """
        path = self._folder / Path(name).name
        return self._mesh.load(_read(path, path.stem.partition("-")[2]).program, order, donated)

    def file_name(self, graph: TracedGraph) -> str:
        return self._path(graph).name

    def count_hit(self) -> None:
        self._hits += 1

    def read_recipes(self, session: str) -> dict[str, Any] | None:
        """What ``write_recipes`` wrote for this session and this cache's circumstances; else nothing.

        None where another file has the place, which is left as it is.
        """
        path, key = self._recipes(session)
        try:
            return _read(path, key).description["recipes"]
        except FileNotFoundError:
            return {}
        except (OSError, _Unusable) as error:
            ours = isinstance(error, _Unusable) and error.ours
            then = "traced anew" if ours else "traced; the file is left as it is"
            note(f"{path} can't be used ({error}): graphs are {then}.")
            return {} if ours else None

    def write_recipes(self, session: str, recipes: Mapping[str, Any]) -> None:
        path, key = self._recipes(session)
        self._write(path, lambda: Kept({"key": key, "recipes": recipes}, b"", b""))

    def _recipes(self, session: str) -> tuple[Path, str]:
        """Where a session's recipes are, and their key."""
        key = digest([_FORMAT, "recipes", session, self._circumstances])
        return self._folder / f"{key}{_RECIPES_SUFFIX}", key

    def _compile(self, graph: TracedGraph, name: str, keeps: bool) -> tuple[Program, dict[str, Any]]:
        begin = time.perf_counter()
        program = self._mesh.compile(graph, self._options)
        description = {"key": self._key(graph), "name": name, **self._circumstances}
        description["compile_s"] = time.perf_counter() - begin
        description |= program.memory._asdict() if self._mesh.platform == "tpu" else {}
        if keeps:
            self._write(self._path(graph), lambda: Kept(description, program.serialize(), self._text(program)))
        return program, description

    def _text(self, program: Program) -> bytes:
        return zlib.compress(program.text.encode()) if self._mesh.platform == "tpu" else b""

    def _write(self, path: Path, make: Callable[[], Kept]) -> None:
        try:
            replace_file(path, _content(make()), mode=0o600)
        except Exception as error:  # a full disk, a folder for reading only, a device that doesn't give programs
            why = error.strerror if isinstance(error, OSError) else str(error).strip().split("\n", 1)[0]
            note(f"A compiled program could not be kept in {self._folder} ({why}); the next start compiles it, too.")

    def _key(self, graph: TracedGraph) -> str:
        return digest([_FORMAT, _described(graph), self._circumstances])

    def _path(self, graph: TracedGraph) -> Path:
        """Files of the same graph have the same beginning, whatever they were compiled for."""
        return self._folder / f"{_prefix(graph)}-{self._key(graph)}{_SUFFIX}"

    def _say_what_differs(self, graph: TracedGraph) -> None:
        """Note what a graph was compiled for that is here under other keys."""
        for path in sorted(self._folder.glob(f"{_prefix(graph)}-*{_SUFFIX}")):
            with suppress(OSError, _Unusable):
                other = _read(path, None).description
                now = self._circumstances
                names = [name for name in now if other.get(name) != now[name]]
                found = "; ".join(f"{name}: {shown(other.get(name))}, now {shown(now[name])}" for name in names)
                note(f"{self._folder} has such a program made under other circumstances, which is not loaded. {found}.")
                return


def _circumstances(mesh: Mesh, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """All that a program depends on beside its graph, as JSON has it."""
    from runtime.devices import pjrt, tracing

    found = {
        "device": mesh.kind,
        "devices": mesh.arrangement,
        "options": dict(options or {}),
        "environment": pjrt.environment(),
        "versions": pjrt.versions(),
        # How programs are traced, and wrapped for the compiler, determines what they take in which order.
        "code": digest([Path(module.__file__).read_text("utf-8") for module in (pjrt, tracing)]),
    }
    if mesh.platform == "cpu":
        found |= {"processor": _processor(), "threads": os.environ.get(_THREADS, "")}
    return json.loads(json.dumps(found))


@cache
def _processor() -> str:
    """The digest of what the kernel says that this processor is and can do."""
    named = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")  # of x86
    named += ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features")  # of Arm
    lines = [platform.machine(), platform.processor()]
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n", 1)[0].splitlines()
        lines += [" ".join(line.split()) for line in first if line.split(":")[0].strip() in named]
    return digest(lines)


def _described(graph: TracedGraph) -> dict[str, Any]:
    return {
        "graph": graph.fingerprint,
        "inputs": [_kind(tensor) for tensor in graph.inputs],
        "results": [_kind(tensor) for tensor in graph.results],
        "donated": list(graph.donated),
        "constants": [[index, *value_of(tensor)] for index, tensor in sorted(graph.constants.items())],
    }


def _kind(tensor: TracedTensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype), tensor.axis]


def value_of(tensor: torch.Tensor) -> list[Any]:
    """What tells a tensor of these values from others."""
    import torch

    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [list(tensor.shape), str(tensor.dtype), hashlib.sha256(values).hexdigest()]


def _prefix(graph: TracedGraph) -> str:
    return digest(_described(graph))[:16]


def digest(value: Any) -> str:
    """The sha256 of what JSON has."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _content(kept: Kept) -> bytes:
    """A file's bytes."""
    sizes = {"program_bytes": len(kept.program), "text_bytes": len(kept.text)}
    description = json_bytes(kept.description | sizes)
    body = b"".join([_LENGTH.pack(len(description)), description, kept.program, kept.text])
    return _HEAD.pack(_MAGIC, _FORMAT, len(body), hashlib.sha256(body).digest()) + body


def _read(path: Path, key: str | None) -> Kept:
    """The program in a file; ``key`` None takes any. Raises _Unusable, or OSError where it can't be read.

    Raises InputError where others may have written the file.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise _Unusable("it is no plain file", ours=False)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _check_owner(path, os.fstat(file.fileno()))
        content = file.read()
    if not content.startswith(_MAGIC):
        raise _Unusable("it is not one of llama-run's", ours=False)
    if len(content) < _HEAD.size:
        raise _Unusable("it is cut off", ours=True)
    _, number, length, digest = _HEAD.unpack_from(content)
    body = memoryview(content)[_HEAD.size :]
    if number != _FORMAT:
        raise _Unusable(f"its format is {number}, not {_FORMAT}", ours=True)
    if len(body) != length:
        raise _Unusable(f"it has {len(body)} of {length} bytes", ours=True)
    if hashlib.sha256(body).digest() != digest:
        raise _Unusable("its bytes have changed since it was written", ours=True)
    return _parsed(body, key)


def _parsed(body: memoryview, key: str | None) -> Kept:
    """The parts of a body whose digest is right. Raises _Unusable for another key's."""
    [length] = _LENGTH.unpack_from(body)
    begin = _LENGTH.size + length
    description = json.loads(bytes(body[_LENGTH.size : begin]))
    if key not in (None, description["key"]):
        raise _Unusable("it holds the program of another key", ours=False)
    end = begin + description["program_bytes"]
    return Kept(description, bytes(body[begin:end]), bytes(body[end:]))
