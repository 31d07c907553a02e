"""The only module that uses jax, for PJRT: devices, arrays on them, and programs compiled for them.

The devices are those of this process or slice, or those of a topology, which need not be present: they are compiled
for alike, but only the former run anything. All interfaces used here are jax's public ones. One of them is used in a
way that its authors had not in mind: a program that wasn't written in jax takes the place of one that was exported
from it (``_exported``).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property
from inspect import signature
from typing import Any, NamedTuple

import torch

from converters.console.errors import InputError
from runtime.devices.cluster import WAIT_S, Cluster, meet
from runtime.devices.processes import Processes, expect_aborts
from runtime.devices.tracing import TracedGraph, TracedTensor, traced_as

_AXIS = "tp"  # of the mesh: tensor parallel
_COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that jax records for every program it compiles
_HEARTBEAT_S = 20  # without a sign of life of a process, after which jax ends the others
_SHUTDOWN_S = 60  # for which a process that has finished waits for the others
_HOST_VARIABLES = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # where jax looks for the hosts of a TPU slice
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL", "JAX_DISABLE_MOST_OPTIMIZATIONS")
_INTEGERS = {1: torch.int8, 2: torch.int16}  # by size, for dtypes that numpy lacks


def start(platform: str, chips: int | None = None, cluster: Cluster | None = None) -> list[Any]:
    """This process's devices and those of the others that run with it: jax's ``Device`` objects.

    ``platform`` is jax's name of a kind of device: cpu, tpu, cuda. On the CPU ``chips`` virtual ones are made, in all
    processes together, where jax has not started yet. The processes are those of ``cluster`` or, on a TPU slice of
    several hosts, those that jax finds. Raises RuntimeError where there is no such device, and InputError where the
    processes don't meet.
    """
    import jax

    jax.config.update("jax_enable_x64", True)  # token ids and slots are torch's int64
    with suppress(RuntimeError):  # of a jax that has started already, which has the devices that it has
        jax.config.update("jax_platforms", platform)
        if chips is not None:
            jax.config.update("jax_num_cpu_devices", cluster.virtual_chips(chips) if cluster else chips)
    if cluster is not None:
        _join(cluster)
    elif platform == "tpu":
        _join_slice()
    environment()
    _count_compilations()
    return jax.devices(platform)


def _join(cluster: Cluster) -> None:
    import jax

    if jax.distributed.is_initialized():  # by an earlier session; its processes stay together
        if (jax.process_count(), jax.process_index()) == (cluster.processes, cluster.process_id):
            return
        raise InputError("This process runs together with others already; start new ones for another cluster.")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    meet(cluster)
    _initialize(
        coordinator_address=cluster.coordinator,
        num_processes=cluster.processes,
        process_id=cluster.process_id,
        coordinator_bind_address=cluster.bind_address,
        cluster_detection_method="deactivate",
    )


def _initialize(**cluster: Any) -> None:
    """Start jax's service between the processes, which it has to find itself where they are not given."""
    import jax

    if jax.distributed.is_initialized():
        return
    if not _knows_processes():
        raise InputError(f"Several processes need jax 0.10, on Python 3.11 or newer; this is {jax.__version__}.")
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from ending the process
    expect_aborts()
    try:
        jax.distributed.initialize(
            initialization_timeout=WAIT_S,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
            **cluster,
        )
    except RuntimeError as error:
        raise InputError(
            f"jax can't bring this process together with the others ({first_line(error)}). Open the first session "
            "before any other use of jax."
        ) from error


def _knows_processes() -> bool:
    """Whether this jax has the settings by which processes end together; that of Python 3.10 hasn't."""
    import jax

    return "heartbeat_timeout_seconds" in signature(jax.distributed.initialize).parameters


def _join_slice() -> None:
    """Join the other hosts of a TPU slice, where jax finds some: in the environment, or by a TPU VM's metadata."""
    hosts = next((os.environ[name] for name in _HOST_VARIABLES if name in os.environ), None)
    if ("," not in hosts) if hosts is not None else not _knows_processes():
        return
    try:
        _initialize()
    except (ValueError, ImportError, OSError) as error:
        if hosts is not None:
            raise InputError(
                f"jax can't find the slice of this host ({first_line(error)}). Check TPU_WORKER_HOSTNAMES and "
                "TPU_WORKER_ID, or give --coordinator, --processes and --process-id."
            ) from error
        # no metadata either: this host is alone


def topology_devices(name: str, options: Mapping[str, Any]) -> list[Any]:
    """The devices of a TPU slice, to compile for, by libtpu's name for it. No device is opened."""
    import jax
    from jax.experimental import topologies

    environment()
    with suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")  # a plan must not occupy this machine's TPU, if it has one
    jax.config.update("jax_enable_x64", True)
    return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)


@cache
def environment() -> dict[str, list[str]]:
    """The variables by which a user alters programs, as they were at the first start: torch_xla adds to them later."""
    return {name: os.environ[name].split() for name in _VARIABLES if os.environ.get(name)}


def compilations() -> int:
    """Programs that XLA has compiled so far in this process, whoever asked for them."""
    return _count_compilations()[0]


@cache
def _count_compilations() -> list[int]:
    """A list with the number of programs compiled since the first call."""
    import jax

    count = [0]

    def hear(event: str, seconds: float, **_: Any) -> None:
        count[0] += event == _COMPILED

    jax.monitoring.register_event_duration_secs_listener(hear)
    return count


def versions() -> dict[str, str]:
    """The versions of what traces and compiles, by package; without those that are not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "torch_xla", "jax", "jaxlib", "libtpu"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class OutOfMemory(Exception):
    """The compiler could not fit a program into a chip's memory; the message is the first line of the compiler's."""


class Memory(NamedTuple):
    """What a program needs, in bytes per chip."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # the part of the outputs that is written over arguments
    temp_bytes: int


class Program:
    """A program compiled for a mesh."""

    def __init__(self, compiled: Any, order: Sequence[int], donated: int) -> None:
        """``order`` has the graph's inputs as the program takes them, of which the last ``donated`` are donated."""
        self._compiled, self._order = compiled, order
        self.donated = tuple(range(len(order) - donated, len(order)))  # by the numbers of the text's parameters

    @cached_property
    def memory(self) -> Memory:
        """What the program needs. It takes tens of milliseconds to ask."""
        found = self._compiled.memory_analysis()
        return Memory(
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
            found.alias_size_in_bytes,
            found.temp_size_in_bytes,
        )

    @property
    def text(self) -> str:
        """The optimized HLO; a TPU's compiler adds its cost model's cycles."""
        return self._compiled.as_text()

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """The results for ``inputs``, arrays in the order of the graph's. Those that it donates are used up."""
        return self._compiled(*[inputs[place] for place in self._order])

    def serialize(self) -> bytes:
        """What ``Mesh.load`` makes the program of again."""
        from jax.experimental import serialize_executable

        return pickle.dumps(serialize_executable.serialize(self._compiled))


class Mesh:
    """Chips in the order of the shards' files, over which programs are split."""

    def __init__(self, devices: Sequence[Any], platform: str) -> None:
        """``platform`` is jax's name of the devices' kind: cpu, tpu, cuda."""
        import jax
        import numpy as np

        self.devices, self.platform = list(devices), platform
        self._mesh = jax.sharding.Mesh(np.array(self.devices), (_AXIS,))

    @property
    def chips(self) -> int:
        return len(self.devices)

    @property
    def kind(self) -> str:
        """The devices' model, as the compiler names it."""
        return self.devices[0].device_kind

    @property
    def arrangement(self) -> list[Any]:
        """What tells these devices from others of their kind, and is the same for a slice and for its topology: each
        one's number and place. For others than TPUs also the runtime's version, and which devices are this process's.
        """
        if self.platform != "tpu":
            own = [[device.id, device.process_index] for device in self.devices]
            return [self.devices[0].client.platform_version, self.local_chips, *own]
        return [[device.id, *device.coords, device.core_on_chip] for device in self.devices]

    @property
    def local_chips(self) -> list[int]:
        """The chips that this process feeds: all of them on one host, its own on a slice of several hosts."""
        import jax

        return [chip for chip, device in enumerate(self.devices) if device.process_index == jax.process_index()]

    def processes(self) -> Processes:
        """The processes whose chips these are, connected to each other: the chips of all have computed together once.

        gloo connects the CPUs when they first do, and gives up after half a minute: so not when one still compiles.
        """
        import jax

        found = Processes(jax.process_index(), jax.process_count(), self._gather)
        found.agree({})
        return found

    def _gather(self, message: bytes) -> list[bytes]:
        """The messages of all processes, equally long, in their order."""
        import jax
        import numpy as np

        row = np.frombuffer(message, np.uint8)[None]
        local = [jax.device_put(row, self.devices[chip]) for chip in self.local_chips]
        split, whole = self._sharding(0, 2), self._sharding(None, 2)
        rows = jax.make_array_from_single_device_arrays((self.chips, len(message)), split, local)
        gathered = np.asarray(jax.jit(_same, out_shardings=whole)(rows).addressable_data(0))
        by_process = {device.process_index: gathered[chip].tobytes() for chip, device in enumerate(self.devices)}
        return [by_process[process] for process in sorted(by_process)]

    def place(self, parts: Sequence[torch.Tensor], axis: int | None) -> Any:
        """The local chips' parts, in the order of ``local_chips``, as one array split on ``axis`` (None: copied).

        A CPU's chips use the tensors' own memory where they can, so the tensors must not be changed afterwards.
        """
        import jax

        shape = list(parts[0].shape)
        if axis is not None:
            shape[axis] *= self.chips
        devices = [self.devices[chip] for chip in self.local_chips]
        values = [_to_numpy(part.view(self._held_as(part.dtype))) for part in parts]
        arrays = [jax.device_put(part, device) for part, device in zip(values, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(tuple(shape), self._sharding(axis, len(shape)), arrays)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, axis: int | None) -> Any:
        """An array of zeros, made on the chips."""
        import jax.numpy as jnp

        held = _dtype(self._held_as(dtype))
        return jnp.zeros(tuple(shape), held, device=self._sharding(axis, len(shape)))

    def compile(self, graph: TracedGraph, options: Mapping[str, Any] | None = None) -> Program:
        """The graph compiled for these chips; ``options`` are settings of XLA's. Raises OutOfMemory."""
        import jax

        exported, order = _exported(graph, self.platform), _donated_last(graph)
        kept = len(order) - len(graph.donated)

        def run(*inputs: Any) -> list[Any]:
            by_index = dict(zip(order, inputs, strict=True))
            by_index |= {index: _to_numpy(value) for index, value in graph.constants.items()}
            return exported.call(
                *[by_index[index].astype(_dtype(traced_as(kind.dtype))) for index, kind in enumerate(graph.inputs)]
            )

        lowered = jax.jit(
            run,
            in_shardings=tuple(self._sharding_of(graph.inputs[index]) for index in order),
            out_shardings=[self._sharding_of(result) for result in graph.results],
            donate_argnums=tuple(range(kept, len(order))),
            keep_unused=True,
        ).lower(*[_shape(graph.inputs[index], self._held_as(graph.inputs[index].dtype)) for index in order])
        try:
            compiled = lowered.compile(compiler_options=dict(options) if options else None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise OutOfMemory(first_line(error)) from None
            raise
        return Program(compiled, order, len(graph.donated))

    def load(self, serialized: bytes, graph: TracedGraph) -> Program:
        """A program that ``Program.serialize`` gave, for the same graph. It can do whatever it likes to this process:
        load none from strangers.
        """
        from jax.experimental import serialize_executable

        payload, in_tree, out_tree = pickle.loads(serialized)
        client = self.devices[0].client
        compiled = serialize_executable.deserialize_and_load(
            payload, in_tree, out_tree, backend=client, execution_devices=self.devices
        )
        return Program(compiled, _donated_last(graph), len(graph.donated))

    def free_bytes(self) -> int | None:
        """The bytes that are free on the fullest of the local chips; None where they keep no account."""
        found = [stats for chip in self.local_chips if (stats := self.devices[chip].memory_stats())]
        free = [stats["bytes_limit"] - stats["bytes_in_use"] for stats in found if "bytes_limit" in stats]
        return min(free, default=None)

    def peak_bytes(self) -> int | None:
        """The most bytes that one of the local chips has used; None where they keep no account."""
        found = [self.devices[chip].memory_stats() for chip in self.local_chips]
        peaks = [stats["peak_bytes_in_use"] for stats in found if stats and "peak_bytes_in_use" in stats]
        return max(peaks, default=None)

    def _held_as(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of arrays for this one: on the CPU jax compiles programs of int4 and then refuses its own arrays,
        for layouts that it takes to be others.
        """
        return traced_as(dtype) if self.platform == "cpu" else dtype

    def _sharding(self, axis: int | None, rank: int) -> Any:
        import jax

        spec = [None] * rank if axis is None else [None] * axis + [_AXIS]
        return jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec(*spec))

    def _sharding_of(self, tensor: TracedTensor) -> Any:
        return self._sharding(tensor.axis, len(tensor.shape))


def _same(array: Any) -> Any:
    return array


def wait(arrays: Any) -> None:
    """Block until these arrays are computed: any structure of them."""
    import jax

    jax.block_until_ready(arrays)


def describe(array: Any) -> TracedTensor:
    """What a program takes such an array as: one that ``Mesh`` placed, or a program's result."""
    spec = array.sharding.spec
    axis = next((place for place, name in enumerate(spec) if name is not None), None)
    return TracedTensor(array.shape, getattr(torch, str(array.dtype)), axis)


def to_host(array: Any) -> torch.Tensor:
    """An array that is whole on every chip, as a tensor on the host. Waits for it."""
    import numpy as np

    values = np.asarray(array.addressable_data(0))
    name = str(values.dtype)
    if values.dtype.isbuiltin == 1:
        return torch.from_numpy(np.require(values, requirements="W"))
    return torch.from_numpy(values.view(f"int{8 * values.itemsize}").copy()).view(getattr(torch, name))


def _to_numpy(tensor: torch.Tensor) -> Any:
    """The tensor's own memory, as numpy and jax see it."""
    tensor = tensor.detach()
    try:
        return tensor.contiguous().numpy()
    except (TypeError, NotImplementedError):  # bfloat16, float8, int4: numpy has them by the package ml_dtypes
        return tensor.view(_INTEGERS[tensor.itemsize]).contiguous().numpy().view(_dtype(tensor.dtype))


def _dtype(dtype: torch.dtype) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(str(dtype).removeprefix("torch."))


def _shape(tensor: TracedTensor, dtype: torch.dtype) -> Any:
    import jax

    return jax.ShapeDtypeStruct(tensor.shape, _dtype(dtype))


def _donated_last(graph: TracedGraph) -> list[int]:
    """The graph's inputs but for its constants, those that it donates last, in the order of the results.

    jax writes a result over the first donated input that is like it and that no result before it has taken.
    """
    kept = [index for index in range(len(graph.inputs)) if index not in graph.donated and index not in graph.constants]
    return kept + list(graph.donated)


def donated_parameters(graph: TracedGraph) -> tuple[int, ...]:
    """The numbers of the parameters, in the text of the graph's program, that results replace."""
    count = len(_donated_last(graph))
    return tuple(range(count - len(graph.donated), count))


def _exported(graph: TracedGraph, platform: str) -> Any:
    """The graph as something that jax calls: an exported function of the same inputs (``traced_as``) and results, whose
    program is replaced by the graph's.
    """
    import jax
    import jax.numpy as jnp
    from jax import export

    def stand_in(*inputs: Any) -> list[Any]:
        return [jnp.zeros(result.shape, _dtype(result.dtype)) for result in graph.results]

    shapes = [_shape(each, traced_as(each.dtype)) for each in graph.inputs]
    exported = export.export(jax.jit(stand_in, keep_unused=True), platforms=[platform])(*shapes)
    return replace(exported, mlir_module_serialized=graph.module)


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n", 1)[0]
