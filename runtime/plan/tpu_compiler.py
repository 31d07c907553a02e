"""The TPU's own compiler, without a TPU: libtpu compiles for a slice that need not be present."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from converters.console.errors import InputError
from quantize.slices import Slice
from runtime.devices import pjrt
from runtime.devices.backend import CacheUse
from runtime.devices.compile_cache import CompileCache
from runtime.devices.tracing import TracedGraph
from runtime.plan.chips import libtpu_topology


@dataclass(frozen=True)
class CompiledProgram:
    """What is kept of a compiled graph, with bytes per chip. ``text`` is the optimized HLO, with the cost model's
    cycles.
    """

    text: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # the part of the outputs that is written over arguments
    temp_bytes: int
    compile_s: float
    donated: tuple[int, ...] = ()  # the numbers of the text's parameters that results replace

    @property
    def peak_bytes(self) -> int:
        """What the program needs at once: arguments, outputs that are not written over them, temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


def require_libtpu() -> None:
    """Raise InputError, saying what to install, where the compiler is missing."""
    if find_spec("libtpu") is None:
        raise InputError(
            "--compile needs the TPU's compiler, and libtpu is not installed. Install the extra: "
            "pip install 'llama-tpu-toolchain[tpu]' (no TPU is needed), or leave out --compile."
        )


class TPUCompiler:
    """The compiler for one slice, with as many devices as the slice has chips."""

    def __init__(self, target: Slice, compile_cache: Path | None = None) -> None:
        """``compile_cache`` is a folder in which programs are kept, for llama-run on such a slice and for another plan.

        Raises InputError where the compiler is not installed, or doesn't know the slice.
        """
        require_libtpu()
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no lock file is needed, since no TPU is taken
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", target.name)
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
        name, options = libtpu_topology(target)
        try:
            self.devices = pjrt.topology_devices(name, options)
        except Exception as error:
            raise InputError(f"libtpu can't compile for {target.name}: {pjrt.first_line(error)}") from None
        if len(self.devices) != target.devices:
            raise InputError(f"libtpu gives {target.name} {len(self.devices)} devices; {target.devices} were expected.")
        self._mesh = pjrt.Mesh(self.devices, "tpu")
        self._cache = CompileCache(compile_cache, self._mesh) if compile_cache else None

    @property
    def cache_use(self) -> CacheUse | None:
        """How many programs the compile cache had; None without one."""
        return self._cache and self._cache.use

    def compile(self, graph: TracedGraph, name: str = "graph") -> CompiledProgram:
        """Compile a traced graph, split over the slice's chips. Raises pjrt.OutOfMemory where no chip could hold it.

        A program from the compile cache has the time that it took when it was compiled.
        """
        if self._cache:
            return CompiledProgram(**asdict(self._cache.report(graph, name)), donated=pjrt.donated_parameters(graph))
        begin = time.perf_counter()
        program = self._mesh.compile(graph)
        seconds = time.perf_counter() - begin
        return CompiledProgram(
            text=program.text,
            **program.memory._asdict(),
            compile_s=seconds,
            donated=program.donated,
        )
