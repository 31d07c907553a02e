"""The TPU's own compiler, without a TPU: libtpu compiles for a slice that need not be present.

The only module that uses jax, through which libtpu's ahead-of-time interface is reached. Nothing here opens a device:
the topology comes from a name, and jax itself is restricted to the CPU.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from converters.console.errors import InputError
from quantize.slices import Slice
from runtime.devices.xla import TracedGraph
from runtime.plan.chips import libtpu_topology

_PARTS = ("libtpu", "jax", "jaxlib")


@dataclass(frozen=True)
class CompiledProgram:
    """A compiled graph, with bytes per chip. ``text`` is the optimized HLO, with the cost model's cycles."""

    text: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # the part of the outputs that is written over arguments
    temp_bytes: int
    compile_s: float

    @property
    def peak_bytes(self) -> int:
        """What the program needs at once: arguments, outputs that are not written over them, temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


class OutOfMemory(Exception):
    """The compiler could not fit a program into a chip's HBM; the message is the first line of the compiler's."""


def require_libtpu() -> None:
    """Raise InputError, saying what to install, where the compiler or the jax packages that it needs are missing."""
    missing = [name for name in _PARTS if find_spec(name) is None]
    if missing:
        raise InputError(
            f"--compile needs the TPU's compiler, and {', '.join(missing)} is not installed. Install the extra: "
            "pip install 'llama-tpu-toolchain[tpu]' (no TPU is needed), or leave out --compile."
        )


class TPUCompiler:
    """The compiler for one slice, with as many devices as the slice has chips."""

    def __init__(self, target: Slice) -> None:
        """Raises InputError where the compiler is not installed, or doesn't know the slice."""
        require_libtpu()
        os.environ["JAX_PLATFORMS"] = "cpu"  # a plan must not occupy this machine's TPU, if it has one
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no lock file is needed, since no TPU is taken
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", target.name)
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
        from jax.experimental import topologies

        name, options = libtpu_topology(target)
        try:
            topology = topologies.get_topology_desc(topology_name=name, platform="tpu", **options)
        except Exception as error:
            raise InputError(f"libtpu can't compile for {target.name}: {_first_line(error)}") from None
        self._devices = topology.devices
        self.target = target
        if len(self._devices) != target.devices:
            raise InputError(
                f"libtpu gives {target.name} {len(self._devices)} devices; {target.devices} were expected."
            )

    def compile(self, graph: TracedGraph) -> CompiledProgram:
        """Compile a traced graph, split over the slice's chips. Raises OutOfMemory where no chip could hold it."""
        import numpy as np
        from jax._src import compiler
        from jax._src.lib import xla_client

        chips = len(self._devices)
        module = _module(graph, chips)
        options = compiler.get_compile_options(
            num_replicas=1,
            num_partitions=chips,
            device_assignment=np.arange(chips).reshape(1, chips),
            use_spmd_partitioning=True,
        )
        # As torch_xla sets them: sharding propagates from the inputs to the results.
        options.executable_build_options.use_shardy_partitioner = False
        options.executable_build_options.allow_spmd_sharding_propagation_to_output = [True]
        begin = time.perf_counter()
        try:
            program = self._devices[0].client.compile(module, xla_client.DeviceList(tuple(self._devices)), options)
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise OutOfMemory(_first_line(error)) from None
            raise
        seconds = time.perf_counter() - begin
        memory = program.get_compiled_memory_stats()
        return CompiledProgram(
            text=program.hlo_modules()[0].to_string(),
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes,
            compile_s=seconds,
        )


def _module(graph: TracedGraph, chips: int) -> bytes:
    """The graph as MLIR bytecode, with every parameter's sharding and the inputs that results are written over."""
    from jax._src.interpreters import mlir as jax_mlir
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    with jax_mlir.make_ir_context():
        computation = xla_client.XlaComputation(graph.hlo)
        module = ir.Module.parse(xla_client._xla.mlir.xla_computation_to_mlir_module(computation))
        [main] = [op for op in module.body.operations if ir.StringAttr(op.attributes["sym_name"]).value == "main"]
        results = {parameter: result for result, parameter in graph.aliases.items()}
        kinds = main.type.inputs
        attributes = []
        for place, (kind, axis) in enumerate(zip(kinds, graph.shard_axes, strict=True)):
            sharding = _sharding(ir.RankedTensorType(kind).rank, axis, chips)
            entry: dict[str, Any] = {"mhlo.sharding": ir.StringAttr.get(sharding)}
            if place in results:
                entry["tf.aliasing_output"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), results[place])
            attributes.append(ir.DictAttr.get(entry))
        main.arg_attrs = ir.ArrayAttr.get(attributes)
        return jax_mlir.module_to_bytecode(module)


def _sharding(rank: int, axis: int | None, chips: int) -> str:
    """An OpSharding as text: one axis split over all chips in order, or None for replicated."""
    if axis is None:
        return "{replicated}"
    tiles = ",".join(str(chips if place == axis else 1) for place in range(rank))
    return f"{{devices=[{tiles}]<=[{chips}]}}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
