"""The only module that uses torch_xla: devices, placing shards, compiling, counting compilations, memory.

XLA runs one SPMD program over all chips of a mesh with the single axis "tp" (tensor parallel). On the CPU the chips
are virtual. torch_xla reads its environment when it is imported, so XLABackend sets it before that.
"""

from __future__ import annotations

import glob
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from quantize.shards.reading import Shards
from runtime.devices.backend import CacheUse
from runtime.devices.bandwidth import measure_read_bandwidth
from runtime.devices.cpu.attention import attend_by_products, attend_by_vectors
from runtime.devices.cpu.process import prepare_cpu_process
from runtime.model.decoder_tensors import DecoderTensor
from runtime.model.device_form import Form
from runtime.model.kv_cache import SLOT_AXIS, FunctionalKVCache
from runtime.model.linears.linear import LinearWeight
from runtime.model.linears.table import Device, linear_kind
from runtime.model.linears.tiled import Tiles, cut
from runtime.model.parts.attention import attend_exactly

TPU_LEAST_ROWS = 2  # the fewest rows for the matrix unit; a single row goes to the vector unit
TPU_FUSE_BYTES = 24_000_000  # a larger weight is not prefetched into on-chip memory
_CACHE_COUNTERS = ("Hit", "Miss", "DeserializeFailure")
PROBE_SIZE = 11520  # side of a square bfloat16 matrix, 253 MiB on each chip: more than on-chip memories hold
PROBE_READS = 16  # reads per program, enough that it runs far longer than its launch takes
_PROBE_ROWS = 8
_PROBE_RUNS, _PROBE_REPEATS = 4, 5  # programs launched back to back per timing, and timings
_SHARDING_CHECKS = 4  # calls after which a program's inputs, mostly its own results, won't change their sharding


class XLABackend:
    """The chips of a mesh as one XLA device under SPMD."""

    cache_type = FunctionalKVCache
    steps_ahead = 4
    tiled = False  # whether weights are cut into tiles, for XLA:CPU; TPUs take them as they are

    def __init__(self, chips: int, compile_cache: Path | None = None) -> None:
        """Start XLA on ``chips`` chips: those of the TPU slice where there is one, else virtual ones on the CPU.

        ``compile_cache`` is a folder in which compiled programs are kept for later processes.

        Raises InputError where this machine's slice has another number of chips or lacks the device that PJRT_DEVICE
        asks for.
        """
        kind = _choose_device()
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA warns at every compilation that GSPMD will be removed
        if compile_cache is not None:
            os.environ["XLA_PERSISTENT_CACHE_PATH"] = str(compile_cache.absolute())
        if kind == "CPU":
            os.environ["CPU_NUM_DEVICES"] = str(chips)
            prepare_cpu_process(chips)
        import torch_xla.runtime as xr

        with _starting(kind):
            xr.use_spmd()
            present = xr.global_runtime_device_count()
        if present != chips:
            raise InputError(
                f"The shards are for {chips} chips and this slice has {present}. Re-shard them: llama-quantize "
                f"SHARDS --chips {present} --out OTHER, with the --int8 or --bf16 they were made with."
            )
        self.chips = chips
        self.platform = f"{kind.lower()}/xla"
        self.tiled = kind == "CPU"
        if self.tiled:
            self.cache_type = _StretchKVCache
            by_vectors = partial(attend_by_vectors, chips=chips, materialize=self._materialize)
            self.form = Form(
                self._cpu_linear, attend_one=by_vectors, attend_many=attend_by_products, materialize=self._materialize
            )
        else:
            self.form = _chip_form(TPU_LEAST_ROWS if kind == "TPU" else 1)
        self.fuse_bytes = TPU_FUSE_BYTES if kind == "TPU" else None
        self.leader = xr.process_index() == 0
        self._ones: dict[int, torch.Tensor] = {}  # by length

    @property
    def local_chips(self) -> list[int]:
        """The chips that this process feeds: all of them on one host, its own on a slice of several hosts."""
        from torch_xla import _XLAC

        return [_ordinal(name) for name in _XLAC._xla_get_runtime_devices()]

    def load(self, shards: Shards, tensor: DecoderTensor) -> torch.Tensor:
        """Each local chip's part, read from its file; no host ever holds the whole tensor."""
        parts = [tensor.join([shards.local(part.name, chip) for part in tensor.parts]) for chip in self.local_chips]
        if self.tiled and tensor.are_values and linear_kind(tensor.format, Device.XLA_CPU).in_tiles:
            return self._place_tiles(parts, tensor.shard)
        return self._place(parts, tensor.shard)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, axis: int) -> torch.Tensor:
        local_shape = list(shape)
        local_shape[axis] //= self.chips
        part = torch.zeros(local_shape, dtype=dtype)
        return self._place([part] * len(self.local_chips), axis)

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._place([tensor] * len(self.local_chips), None)

    def compile(self, function: Callable[..., Any], donates: int, exact: bool = False) -> Callable[..., Any]:
        """``function`` traced and compiled by XLA, once per shape and sharding of its inputs."""
        return _Compiled(function, donates, exact)

    def wait(self) -> None:
        """Block until the chips have finished all launched work."""
        import torch_xla.core.xla_model as xm

        xm.wait_device_ops()

    def compilations(self) -> int:
        """Graphs compiled, or loaded from the compile cache, so far in this process."""
        return compiled_graphs() + self.cache_use().hits

    def cache_use(self) -> CacheUse:
        import torch_xla.debug.metrics as metrics

        return CacheUse(*(metrics.counter_value(f"PersistentCache{kind}") or 0 for kind in _CACHE_COUNTERS))

    def read_bandwidth(self) -> float:
        if self.platform.startswith("cpu"):  # virtual chips share the host's memory
            return measure_read_bandwidth(torch.device("cpu"))
        values = self.zeros((self.chips, PROBE_SIZE, PROBE_SIZE), torch.bfloat16, 0)
        program = self.compile(read_repeatedly, donates=1)
        program(values, [])
        seconds = []
        for _ in range(_PROBE_REPEATS):
            self.wait()
            begin = time.perf_counter()
            for _ in range(_PROBE_RUNS):
                program(values, [])
            self.wait()
            seconds.append(time.perf_counter() - begin)
        return _PROBE_RUNS * PROBE_READS * values.nbytes / statistics.median(seconds)

    def peak_bytes(self) -> int | None:
        """None: torch_xla 2.9 doesn't report memory for the single device that SPMD exposes."""
        return None

    def _place_tiles(self, parts: Sequence[torch.Tensor], axis: int | None) -> Tiles:
        """The local chips' parts of a weight [out, in], each cut into tiles separately."""
        tiles = zip(*(cut(part) for part in parts), strict=True)
        if axis != 1 or self.chips == 1:
            return Tiles([self._place(tile, axis) for tile in tiles])
        return Tiles([self._place([part[None] for part in tile], 0) for tile in tiles])

    def _cpu_linear(self, weight: LinearWeight) -> nn.Module:
        return linear_kind(weight.format, Device.XLA_CPU).make(weight, self._ones_of)

    def _materialize(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, divided by ones so that XLA:CPU computes it once: it would recompute sines in every kernel that
        uses them, but considers a division too expensive for that.
        """
        return tensor / self._ones_of(tensor.shape[-1])

    def _ones_of(self, length: int) -> torch.Tensor:
        if length not in self._ones:
            self._ones[length] = self.replicate(torch.ones(length))
        return self._ones[length]

    def _place(self, parts: Sequence[torch.Tensor], axis: int | None) -> torch.Tensor:
        """The local chips' parts, in the order of ``local_chips``, as one tensor split on ``axis`` (None: copied)."""
        import numpy as np
        import torch_xla.distributed.spmd as xs
        from torch_xla import _XLAC

        shape = list(parts[0].shape)
        if axis is not None:
            shape[axis] *= self.chips
        mesh = xs.Mesh(np.arange(self.chips), (self.chips,), ("tp",))
        sharding = mesh.get_op_sharding(tuple("tp" if d == axis else None for d in range(len(shape))))
        return _XLAC._global_tensor_from_cpu_shards([part.contiguous() for part in parts], sharding, shape)


def read_repeatedly(values: torch.Tensor, _: list[torch.Tensor]) -> torch.Tensor:
    """A few rows of each chip's matrix in ``values`` [chips, N, N], multiplied repeatedly by its transpose:
    [chips, 8, N].

    Every product reads the whole matrix and depends on the one before it, but not on another chip's. Products come
    closest to the memory's speed by the compiler's estimate: the vector unit takes twice as long for a sum or a
    maximum. (Also, torch_xla 2.9 turns ``amax`` without an axis into a copy.)
    """
    rows = values[:, :_PROBE_ROWS]
    for _ in range(PROBE_READS):
        rows = rows @ values.mT
    return rows


def _chip_form(least_rows: int) -> Form:
    """The form for chips with a matrix unit."""
    return Form(least_rows=least_rows, attend_one=attend_exactly, attend_many=attend_exactly)


# The integer dtype that XLA:CPU's cache stores each float dtype as, and back.
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_OF_BITS = {bits: dtype for dtype, bits in _BITS.items()}


class _StretchKVCache(FunctionalKVCache):
    """XLA:CPU's cache, in which a range of consecutive slots is written in place.

    index_copy is a scatter, which XLA:CPU compiles to a choice between old and new for every slot, on a copy of the
    cache. It keeps a dynamic-update-slice only for integers: in bfloat16 it converts the whole cache to float32, and in
    float32 it repeats the update for each reader, on a copy. So floats are stored as integers with the same bits.
    """

    @staticmethod
    def stored_as(dtype: torch.dtype) -> torch.dtype:
        return _BITS.get(dtype, dtype)

    def _write(self, whole: torch.Tensor, slots: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return _operation(_write_stretch)(whole, part.to(_OF_BITS.get(whole.dtype, whole.dtype)), slots)

    def _read(self, whole: torch.Tensor) -> torch.Tensor:
        return _operation(_as_float)(whole) if whole.dtype in _OF_BITS else whole


@cache
def _operation(lowering: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """An operation on tensors, made from its lowering, a function of torch_xla's ``xla_builder.Op``."""
    import torch_xla.core.xla_op_registry as xor

    return xor.register(lowering.__name__, lowering)


def _write_stretch(whole: Any, part: Any, slots: Any) -> Any:
    """``whole`` [B, H, S, D] with ``part`` [B, H, T, D] written from the first of ``slots`` [T] on."""
    import torch_xla.core.xla_builder as xb

    held = whole.shape().dtype
    if part.shape().dtype != held:
        part = part.bitcast(held)
    zero = xb.Op.scalar(whole.builder(), 0, dtype=xb.Type.S64)
    start = [zero] * len(whole.shape().sizes)
    start[SLOT_AXIS] = slots.slice_in_dim(0, 1, 0).reshape([])
    return whole.dynamic_update_slice(part, start)


def _as_float(bits: Any) -> Any:
    """The bfloat16 or float32 numbers with these ``bits``, in the same shape."""
    import torch_xla.core.xla_builder as xb

    return bits.bitcast({xb.Type.S16: xb.Type.BF16, xb.Type.S32: xb.Type.F32}[bits.shape().dtype])


class _Compiled:
    """A function of tensors (and lists of them) as XLA programs, one for each shape and sharding of its inputs.

    The function is traced by running it once on lazy tensors. Tensors that aren't arguments, such as a model's weights,
    also become inputs of the program and are kept here. torch.compile's "openxla" backend produces the same programs,
    but its capture took two thirds of the warm-up and several milliseconds of every call.
    """

    def __init__(self, function: Callable[..., Any], donates: int, exact: bool = False) -> None:
        self._function, self._donates, self._exact = function, donates, exact
        self._programs: dict[Any, _Program] = {}

    def __call__(self, *args: Any) -> Any:
        tensors, structure = pytree.tree_flatten(args)
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        program = self._programs.get(key)
        if program is None or not program.takes(tensors):
            donated = pytree.tree_leaves(args[self._donates])
            with _precision(self._exact):
                program = self._programs[key] = _Program(self._function, tensors, structure, donated)
        return program(tensors)


@contextmanager
def _precision(exact: bool) -> Iterator[None]:
    """Give XLA the graphs within this context so that a TPU computes float32 products exactly, if ``exact``.

    That takes several bfloat16 products for each; by default a TPU computes one. torch_xla has one setting per process,
    which it applies when it lowers a graph to XLA's, but not to the products of einsum.
    """
    from torch_xla import _XLAC

    _XLAC._xla_set_mat_mul_precision("highest" if exact else "default")
    try:
        yield
    finally:
        _XLAC._xla_set_mat_mul_precision("default")


class _Trace:
    """A function run once on lazy tensors: its graph's inputs and results, in XLA's order."""

    def __init__(
        self, function: Callable[..., Any], tensors: list[torch.Tensor], structure: Any, donated: list[torch.Tensor]
    ) -> None:
        from torch_xla import _XLAC

        arguments = [_XLAC._xla_get_tensor_id(tensor) for tensor in tensors]
        donors = [_XLAC._xla_get_tensor_id(tensor) for tensor in donated]
        results, self._structure = pytree.tree_flatten(function(*pytree.tree_unflatten(tensors, structure)))
        self.ids, self._values = _XLAC._get_tensors_xla_device_data_node(results)  # in the order of XLA's parameters
        # XLA writes a result over the first donated input of its shape, in the order of its parameters. So results
        # that replace donated inputs must come in that order: otherwise XLA would copy every cache twice.
        others = len(results) - len(donated)
        turns = sorted(range(len(donors)), key=lambda turn: self.ids.index(donors[turn]))
        self._order = [*range(others), *(others + turn for turn in turns)]
        self.results = [results[place] for place in self._order]
        self.aliases = {others + place: self.ids.index(donors[turn]) for place, turn in enumerate(turns)}
        missing = [place for place, tensor in enumerate(arguments) if tensor not in self.ids]
        if missing:
            raise RuntimeError(f"the traced program does not depend on its arguments {missing}")
        # An input that is not an argument keeps its value; one that is comes with every call.
        places = {tensor: place for place, tensor in enumerate(arguments)}
        self._inputs = [places.get(key, value) for key, value in zip(self.ids, self._values, strict=True)]

    def inputs(self, tensors: list[torch.Tensor]) -> list[Any]:
        """The values of XLA's parameters when the function's arguments are ``tensors``."""
        return [tensors[place] if isinstance(place, int) else place for place in self._inputs]

    def restore(self, results: Sequence[Any]) -> Any:
        """XLA's results in the structure that the function returns."""
        ordered: list[Any] = [None] * len(self._order)
        for place, result in zip(self._order, results, strict=True):
            ordered[place] = result
        return pytree.tree_unflatten(ordered, self._structure)

    def hlo(self) -> bytes:
        """The graph as a serialized HloModuleProto, before any of XLA's passes."""
        from torch_xla import _XLAC

        return _XLAC._get_xla_tensors_hlo_proto(self.results)


class _Program:
    """One compiled XLA program."""

    def __init__(
        self, function: Callable[..., Any], tensors: list[torch.Tensor], structure: Any, donated: list[torch.Tensor]
    ) -> None:
        import torch_xla
        import torch_xla.core.xla_model as xm
        from torch_xla import _XLAC
        from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

        xm.wait_device_ops()  # a running program's results are placeholders, which tracing can't tell apart
        for tensor in donated:
            _XLAC._set_buffer_donation(tensor, True)
        self._trace = _Trace(function, tensors, structure, donated)
        results, self._trace.results = self._trace.results, []  # they would keep the graph alive
        with alias_with_buffer_donor_config():
            self._hash = _XLAC._get_graph_hash(results)
            _XLAC._xla_warm_up_cache(results, [])
        _XLAC._clear_pending_irs(str(torch_xla.device()))
        self._shardings = _XLAC._get_xla_sharding_specs(tensors)
        self._checks = _SHARDING_CHECKS

    def takes(self, tensors: list[torch.Tensor]) -> bool:
        """Whether these inputs are split over the chips as the program expects; checked only for the first calls."""
        from torch_xla import _XLAC

        if not self._checks:
            return True
        self._checks -= 1
        return _XLAC._get_xla_sharding_specs(tensors) == self._shardings

    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        from torch_xla import _XLAC

        return self._trace.restore(_XLAC._run_cached_graph(self._hash, self._trace.inputs(tensors)))


class TracedGraph(NamedTuple):
    """A graph for a compiler: a serialized HloModuleProto, and the shardings and donated inputs that it lacks."""

    hlo: bytes
    shard_axes: list[int | None]  # for each parameter; None where it is whole on every chip
    aliases: dict[int, int]  # from a result's index to that of the parameter over which it is written


class Tracer:
    """Replaces a slice's TPUs where there are none: tensors without memory, functions traced for a compiler.

    It has the part of ``Backend`` that building a decoder needs, and uses only torch_xla's single virtual device.
    """

    fuse_bytes: int | None = TPU_FUSE_BYTES
    cache_type = XLABackend.cache_type

    def __init__(self, chips: int, least_rows: int = TPU_LEAST_ROWS) -> None:
        os.environ["PJRT_DEVICE"] = "CPU"  # even on a machine with a TPU, which others may be using
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        self.chips, self.form = chips, _chip_form(least_rows)
        self._axes: dict[int, int | None] = {}

    def load(self, config: ModelConfig, tensor: DecoderTensor) -> torch.Tensor:
        """A tensor as ``XLABackend.load`` returns it, but without values."""
        shape = list(tensor.local_shape(config, self.chips))
        if tensor.shard is not None:
            shape[tensor.shard] *= self.chips
        return self.zeros(shape, tensor.dtype, tensor.shard)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, axis: int | None) -> torch.Tensor:
        import torch_xla.core.xla_builder as xb
        from torch_xla import _XLAC

        tensor = xb.create_placeholder_tensor(tuple(shape), dtype)
        self._axes[_XLAC._xla_get_tensor_id(tensor)] = axis
        return tensor

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.zeros(tensor.shape, tensor.dtype, None)

    def trace(
        self, function: Callable[..., Any], args: tuple[Any, ...], donates: int, exact: bool = False
    ) -> TracedGraph:
        """The graph of ``function`` for these arguments, as ``XLABackend.compile`` would give it to XLA."""
        import torch_xla
        from torch_xla import _XLAC

        tensors, structure = pytree.tree_flatten(args)
        trace = _Trace(function, tensors, structure, pytree.tree_leaves(args[donates]))
        with _precision(exact):
            hlo = trace.hlo()
        graph = TracedGraph(hlo, [self._axes.get(key) for key in trace.ids], trace.aliases)
        _XLAC._clear_pending_irs(str(torch_xla.device()))
        return graph


def _ordinal(device_name: str) -> int:
    """``TPU:3`` -> 3."""
    return int(device_name.rsplit(":", 1)[1])


def _has_tpu() -> bool:
    """Whether this machine has a TPU's device files (the kernel's accel driver, or vfio with Google's vendor id)."""
    if glob.glob("/dev/accel[0-9]*"):
        return True
    for path in glob.glob("/sys/bus/pci/devices/*/vendor"):
        with open(path, encoding="ascii") as file:
            if file.read().strip() == "0x1ae0" and glob.glob("/dev/vfio/[0-9]*"):
                return True
    return False


def _choose_device() -> str:
    """PJRT_DEVICE; where unset, it is set to what this machine has. Raises InputError for a TPU that isn't there."""
    found = "TPU" if _has_tpu() else "CPU"
    asked = os.environ.get("PJRT_DEVICE", "").strip() or found
    kind = asked.upper() if asked.upper() in ("CPU", "TPU") else asked
    # Otherwise libtpu would look for its slice over the network, for minutes.
    if kind == "TPU" and not glob.glob("/dev/accel[0-9]*") and not glob.glob("/dev/vfio/[0-9]*"):
        raise InputError(
            "PJRT_DEVICE is TPU and this machine has none (neither /dev/accel0 nor /dev/vfio/0 and the like are "
            "there). Unset PJRT_DEVICE to run on the CPU."
        )
    os.environ["PJRT_DEVICE"] = kind
    return kind


@contextmanager
def _starting(kind: str) -> Iterator[None]:
    """Turn the exception that torch_xla raises where it finds no device of this kind into an InputError."""
    try:
        yield
    except Exception as error:
        if kind == "CPU":
            raise
        reason = str(error).split(". ")[0].splitlines()[0]
        raise InputError(
            f"XLA can't use PJRT_DEVICE={kind} ({reason}). Unset PJRT_DEVICE, or set it to CPU to run on this "
            "machine's CPU."
        ) from error


def lazy_device() -> torch.device:
    """One XLA device as LazyTensor provides it by default: without SPMD, and with every step traced again.

    Raises InputError as XLABackend does.
    """
    kind = _choose_device()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import torch_xla

    with _starting(kind):
        return torch_xla.device()


def lazy_sync() -> None:
    """Compile and run what has been traced on ``lazy_device``, and wait until it is done."""
    import torch_xla

    torch_xla.sync(wait=True)


def compiled_graphs() -> int:
    """Graphs compiled so far in this process."""
    import torch_xla.debug.metrics as metrics

    data = metrics.metric_data("CompileTime")
    return data[0] if data else 0
