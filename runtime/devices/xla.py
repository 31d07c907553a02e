"""XLA's chips: functions are traced by torch_xla (tracing.py), compiled and run through jax's PJRT (pjrt.py).

XLA runs one SPMD program over all chips of a mesh with a single axis (tensor parallel). On the CPU the chips are
virtual. What a decoder holds are placeholders, which stand for arrays on the chips.
"""

from __future__ import annotations

import glob
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from quantize.shards.chip_weights import ChipWeights
from runtime.devices import pjrt
from runtime.devices.backend import CacheUse, Memory
from runtime.devices.bandwidth import measure_read_bandwidth
from runtime.devices.cluster import Cluster
from runtime.devices.compile_cache import CompileCache, digest, value_of
from runtime.devices.cpu.attention import attend_by_products, attend_one_by_products
from runtime.devices.cpu.process import (
    compiler_options,
    keep_freed_memory,
    prepare_cpu_process,
    return_freed_memory,
)
from runtime.devices.recipes import Recipe, Recipes
from runtime.devices.tracing import (
    StretchKVCache,
    TracedGraph,
    TracedTensor,
    Tracer,
    floats_of_half_bits,
    kept_in_shape,
    product_in_float32,
    product_in_int32,
    to_bfloat16,
)
from runtime.model.decoder_tensors import DecoderTensor
from runtime.model.device_form import Form
from runtime.model.kv_cache import FunctionalKVCache
from runtime.model.linears.codes import Coded, coding_of
from runtime.model.linears.grouped import axis_in_pieces, cut_into_pieces
from runtime.model.linears.linear import LinearWeight, Operations
from runtime.model.linears.table import Device, Layout, linear_kind, make_linear, values_kind
from runtime.model.linears.tiled import Tiles, copy_tiles
from runtime.model.parts.attention import attend_exactly

TPU_LEAST_ROWS = 2  # the fewest rows for the matrix unit; a single row goes to the vector unit
TPU_FUSE_BYTES = 24_000_000  # a larger weight is not prefetched into on-chip memory
PROBE_SIZE = 11520  # side of a square bfloat16 matrix, 253 MiB on each chip: more than on-chip memories hold
PROBE_ROWS = 8  # multiplied by the matrix at each read
PROBE_READS = 16  # reads per program, enough that it runs far longer than its launch takes
_ONES = "ones, "  # begins the labels of vectors of ones
_BLOCK_BYTES = 1 << 24  # read at once of a weight that is cut into tiles
_PROBE_RUNS, _PROBE_REPEATS = 4, 5  # programs launched back to back per timing, and timings


class TPUForm:
    """What building a decoder for a TPU slice needs, without the chips: shapes are traced, nothing is placed."""

    fuse_bytes: int | None = TPU_FUSE_BYTES
    cache_type = FunctionalKVCache

    def __init__(self, chips: int, least_rows: int = TPU_LEAST_ROWS, int8_activations: bool = False) -> None:
        self.chips, self.int8_activations, self.tracer = chips, int8_activations, Tracer()
        self.form = _chip_form(least_rows, chips, int8_activations)

    def load(self, config: ModelConfig, tensor: DecoderTensor) -> torch.Tensor:
        """A placeholder for a tensor, as ``XLABackend.load`` returns it."""
        part = torch.empty(tensor.local_shape(config, self.chips), dtype=tensor.dtype, device="meta")
        part, axis = _laid_out(part, tensor, config, self.chips, self.int8_activations)
        shape = list(part.shape)
        if axis is not None:
            shape[axis] *= self.chips
        return self.tracer.placeholder(shape, part.dtype, axis)

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.tracer.placeholder(tensor.shape, tensor.dtype, None)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, axis: int | None) -> TracedTensor:
        return TracedTensor(tuple(shape), dtype, axis)


class XLABackend:
    """The chips of a mesh under SPMD."""

    cache_type = FunctionalKVCache
    steps_ahead = 4
    tiled = False  # whether weights are cut into tiles, for XLA:CPU; TPUs take them as they are

    def __init__(
        self,
        chips: int,
        compile_cache: Path | None = None,
        cluster: Cluster | None = None,
        session: str | None = None,
        int8_activations: bool = False,
    ) -> None:
        """Start XLA on ``chips`` chips: those of the TPU slice where there is one, else virtual ones on the CPU.

        ``compile_cache`` is a folder in which compiled programs are kept for later processes. ``session`` says all that
        named functions follow from, beside this package's source: on one host's CPU a later start for the same need not
        trace them. With ``cluster`` the chips are those of several processes, on the CPU as many virtual ones of each.
        With ``int8_activations``, weights that allow it are multiplied by activations in int8.

        Raises InputError where this machine's slice has another number of chips or lacks the device that PJRT_DEVICE
        asks for, and where the other processes don't come.
        """
        kind = choose_device()
        self._options = None
        if kind == "CPU":
            self._options = compiler_options(chips)
            prepare_cpu_process()
        self._mesh = pjrt.Mesh(_devices(kind, chips, cluster), kind.lower())
        self.processes = self._mesh.processes()
        self._compile_cache = CompileCache(compile_cache, self._mesh, self._options) if compile_cache else None
        self._recipes: Recipes | None = None
        if kind == "CPU" and self._compile_cache and session is not None and self.processes.count == 1:
            self._recipes = Recipes(self._compile_cache, session)
        self._tracer = Tracer()
        if self._recipes:
            self._recipes.rehearse()
        self._held: dict[str, Any] = {}  # the arrays that placeholders stand for, by their labels
        self.chips, self._int8_activations = chips, int8_activations
        self.platform = f"{kind.lower()}/xla"
        self.tiled = kind == "CPU"
        self._ones: dict[int, torch.Tensor] = {}  # by length
        self._operations = Operations(
            ones=self._ones_of,
            product=product_in_float32,
            integer_product=product_in_int32,
            kept_in_shape=kept_in_shape,
            to_bfloat16=to_bfloat16,
            floats_of_half_bits=floats_of_half_bits,
            chips=chips,
        )
        if self.tiled:
            self.cache_type = StretchKVCache
            one = partial(attend_one_by_products, operations=self._operations)
            self.form = Form(
                self._cpu_linear, attend_one=one, attend_many=attend_by_products, materialize=self._materialize
            )
        else:
            self.form = _chip_form(TPU_LEAST_ROWS if kind == "TPU" else 1, chips, int8_activations)
        self.fuse_bytes = TPU_FUSE_BYTES if kind == "TPU" else None
        self.leader = 0 in self._mesh.local_chips
        self._pending: Any = []  # the results of the last launch

    def check_files(self, shards: ChipWeights) -> None:
        """Those of the chips of this process, which reads no others."""
        shards.check(self._mesh.local_chips)

    def load(self, shards: ChipWeights, tensor: DecoderTensor) -> torch.Tensor | Tiles | Coded:
        """Each local chip's part, read from its file; no host ever holds the whole tensor."""
        chips = self._mesh.local_chips
        layout = linear_kind(tensor.format, Device.XLA_CPU, self._int8_activations).layout
        if self.tiled and tensor.are_values and layout in (Layout.TILES, Layout.CODED):
            return self._load_pieces(shards, tensor, layout)
        parts = [tensor.join([shards.local(part.name, chip) for part in tensor.parts]) for chip in chips]
        if self.tiled:
            return self._hold(parts, tensor.shard, tensor.name)
        laid_out = [_laid_out(part, tensor, shards.config, self.chips, self._int8_activations) for part in parts]
        return self._hold([part for part, _ in laid_out], laid_out[0][1], tensor.name)

    def nbytes(self, loaded: torch.Tensor | Tiles | Coded) -> int:
        pieces = [loaded] if isinstance(loaded, torch.Tensor) else loaded.pieces
        return sum(self._tracer.nbytes(piece) for piece in pieces)

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._hold([tensor] * len(self._mesh.local_chips), None, digest(value_of(tensor)))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, axis: int) -> Any:
        return self._mesh.zeros(shape, dtype, axis)

    def replicate(self, tensor: torch.Tensor) -> Any:
        return self._mesh.place([tensor] * len(self._mesh.local_chips), None)

    def fetch(self, tensor: Any) -> torch.Tensor:
        return pjrt.to_host(tensor)

    def compile(
        self, function: Callable[..., Any], donates: int, exact: bool = False, name: str | None = None
    ) -> Callable[..., Any]:
        """``function`` traced and compiled by XLA, once per shape of its inputs."""
        return _Compiled(self, function, donates, exact, name)

    def keep_recipes(self) -> None:
        if self._recipes:
            self._recipes.keep()

    def wait(self) -> None:
        """Block until the chips have finished all launched work."""
        pjrt.wait(self._pending)
        self._pending = []

    def release(self) -> None:
        self._pending = []
        self._ones.clear()
        self._held.clear()
        self._tracer.release()
        if self._recipes:
            self._recipes.close()

    def compilations(self) -> int:
        """Programs compiled, or loaded from the compile cache, so far in this process."""
        return pjrt.compilations() + self.cache_use().hits

    def cache_use(self) -> CacheUse:
        return self._compile_cache.use if self._compile_cache else CacheUse(0, 0, 0)

    def program(self, graph: TracedGraph, name: str) -> pjrt.Program:
        """The graph's program for these chips, compiled or loaded from the compile cache."""
        if self._compile_cache:
            return self._compile_cache.program(graph, name)
        return self._mesh.compile(graph, self._options)

    def file_name(self, graph: TracedGraph) -> str:
        """That of the graph's program in the compile cache."""
        return self._compile_cache.file_name(graph) if self._compile_cache else ""

    def held(self, label: str) -> Any:
        """The array that the placeholders with this label stand for; None where there is none.

        Ones may be wanted by a trace first, and so by what takes a trace's place.
        """
        if label.startswith(_ONES):
            self._ones_of(int(label.removeprefix(_ONES)))
        return self._held.get(label)

    def read_bandwidth(self) -> float:
        if self.tiled:  # virtual chips share the host's memory
            return measure_read_bandwidth(torch.device("cpu"))
        values = self.zeros((self.chips, PROBE_SIZE, PROBE_SIZE), torch.bfloat16, 0)
        rows = [self.zeros((self.chips, PROBE_ROWS, PROBE_SIZE), torch.bfloat16, 0)]
        program = self.compile(read_repeatedly, donates=1)
        rows = program(values, rows)
        seconds = []
        for _ in range(_PROBE_REPEATS):
            self.wait()
            begin = time.perf_counter()
            for _ in range(_PROBE_RUNS):
                rows = program(values, rows)
            self.wait()
            seconds.append(time.perf_counter() - begin)
        return _PROBE_RUNS * PROBE_READS * values.nbytes / statistics.median(seconds)

    def memory(self) -> Memory:
        return Memory(len(self._mesh.local_chips), self.tiled, self._mesh.free_bytes())

    def peak_bytes(self) -> int | None:
        """None on virtual chips, whose memory is the host's."""
        return self._mesh.peak_bytes()

    def _hold(self, parts: Sequence[torch.Tensor], axis: int | None, label: str) -> torch.Tensor:
        """A placeholder for the local chips' parts, placed as one array split on ``axis`` (None: copied).

        What has the same ``label`` must be the same in all starts for a session, or have other values only.
        """
        array = self._mesh.place(parts, axis)
        self._pending = array
        while label in self._held:
            label += "'"
        self._held[label] = array
        return self._tracer.placeholder(array.shape, parts[0].dtype, axis, stands_for=label)

    def _load_pieces(self, shards: ChipWeights, tensor: DecoderTensor, layout: Layout) -> Tiles | Coded:
        """The values of a weight, as XLA:CPU's linears read them; every local chip's come as blocks of rows."""
        rows, inputs = tensor.local_shape(shards.config, self.chips)
        blocks = [_blocks(shards, tensor, chip) for chip in self._mesh.local_chips]
        if layout is Layout.TILES:
            tiles = [copy_tiles(each, rows) for each in blocks]
            return Tiles(self._hold_pieces(tiles, tensor))
        coding = coding_of(values_kind(tensor.format), inputs, tensor.groups(shards.config, self.chips))
        coded = [coding.encode_blocks(each, rows) for each in blocks]
        return replace(coded[0], pieces=self._hold_pieces([each.pieces for each in coded], tensor))

    def _hold_pieces(self, pieces: Sequence[Sequence[torch.Tensor]], tensor: DecoderTensor) -> list[torch.Tensor]:
        """Pieces [out, ...] of every local chip's part of a weight [out, in]; [chips, out, ...] if inputs are split."""
        axis, by_place = tensor.shard, list(zip(*pieces, strict=True))
        if axis == 1 and self.chips > 1:
            axis, by_place = 0, [[part[None] for part in parts] for parts in by_place]
        return [self._hold(parts, axis, f"{tensor.name}, piece {place}") for place, parts in enumerate(by_place)]

    def _cpu_linear(self, weight: LinearWeight) -> nn.Module:
        return make_linear(weight, Device.XLA_CPU, self._operations, self._int8_activations)

    def _materialize(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, divided by ones so that XLA:CPU computes it once: it would recompute sines in every kernel that
        uses them, but considers a division too expensive for that.
        """
        return tensor / self._ones_of(tensor.shape[-1])

    def _ones_of(self, length: int) -> torch.Tensor:
        if length not in self._ones:
            parts = [torch.ones(length)] * len(self._mesh.local_chips)
            self._ones[length] = self._hold(parts, None, f"{_ONES}{length}")
        return self._ones[length]


class _Compiled:
    """A function of arrays (and lists of them) as XLA programs, one for each set of shapes of its inputs.

    The arrays of the placeholders that it uses, such as a model's weights, also become inputs of the programs.
    """

    def __init__(
        self, backend: XLABackend, function: Callable[..., Any], donates: int, exact: bool, name: str | None
    ) -> None:
        self._backend, self._function, self._donates, self._exact = backend, function, donates, exact
        self._name = name
        self._programs: dict[Any, Callable[[list[Any]], Any]] = {}

    def __call__(self, *args: Any) -> Any:
        arrays, structure = pytree.tree_flatten(args)
        key = tuple((array.shape, array.dtype) for array in arrays)
        if key not in self._programs:
            kinds = pytree.tree_unflatten([pjrt.describe(array) for array in arrays], structure)
            self._programs[key] = self._compile(kinds)
        return self._programs[key](arrays)

    def _compile(self, kinds: Sequence[Any]) -> Callable[[list[Any]], Any]:
        backend = self._backend
        recipe, program = self._known(kinds) or self._traced(kinds)
        if backend.tiled:
            keep_freed_memory()
            return_freed_memory()
        inputs = [backend.held(take) if isinstance(take, str) else None for take in recipe.takes]
        arguments = [(index, take) for index, take in enumerate(recipe.takes) if isinstance(take, int)]
        structure = pytree.treespec_loads(recipe.structure)

        def call(arrays: list[Any]) -> Any:
            given = inputs.copy()
            for index, place in arguments:
                given[index] = arrays[place]
            backend._pending = []  # where the next line is interrupted, these may have been donated already
            backend._pending = program(given)
            return pytree.tree_unflatten(backend._pending, structure)

        return call

    def _known(self, kinds: Sequence[Any]) -> tuple[Recipe, pjrt.Program] | None:
        """What an earlier start found out, if any did."""
        backend = self._backend
        if backend._recipes is None or self._name is None:
            return None
        return backend._recipes.find(self._identity(kinds), lambda label: backend.held(label) is not None)

    def _traced(self, kinds: Sequence[Any]) -> tuple[Recipe, pjrt.Program]:
        backend = self._backend
        trace = backend._tracer.trace(self._function, kinds, self._donates, self._exact)
        program = backend.program(trace.graph, getattr(self._function, "__name__", "graph"))
        recipe = Recipe.of(trace, backend.file_name(trace.graph))
        if backend._recipes is not None and self._name is not None:
            backend._recipes.add(self._identity(kinds), recipe)
        return recipe, program

    def _identity(self, kinds: Sequence[Any]) -> str:
        """What tells the program from the others of the session."""
        return digest([self._name, self._exact, self._donates, repr(kinds)])


def _blocks(shards: ChipWeights, tensor: DecoderTensor, chip: int) -> Iterator[torch.Tensor]:
    """One chip's part of a tensor, as blocks of rows."""
    for part in tensor.parts:
        yield from shards.local_blocks(part.name, chip, _BLOCK_BYTES)


def read_repeatedly(values: torch.Tensor, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The only tensor of ``rows`` [chips, 8, N], multiplied repeatedly by the transpose of each chip's matrix in
    ``values`` [chips, N, N].

    Every product reads the whole matrix and depends on the one before it, but not on another chip's. The result takes
    the place of the rows, so that it stays where it was computed. Products come closest to the memory's speed by the
    compiler's estimate: the vector unit takes twice as long for a sum or a maximum. (Also, torch_xla 2.9 turns ``amax``
    without an axis into a copy.)
    """
    [product] = rows
    for _ in range(PROBE_READS):
        product = product @ values.mT
    return [product]


def _chip_form(least_rows: int, chips: int, int8_activations: bool = False) -> Form:
    """The form for chips with a matrix unit."""
    linear = partial(
        make_linear,
        device=Device.MATRIX_UNIT,
        operations=Operations(integer_product=product_in_int32, kept_in_shape=kept_in_shape, chips=chips),
        int8_activations=int8_activations,
    )
    return Form(linear, least_rows, attend_one=attend_exactly, attend_many=attend_exactly)


def _laid_out(
    part: torch.Tensor, tensor: DecoderTensor, config: ModelConfig, chips: int, int8_activations: bool
) -> tuple[torch.Tensor, int | None]:
    """A chip's part of a tensor as chips with a matrix unit hold it, and the axis along which it is split over them.

    Integers of 4 bits are held as such.
    """
    axis, kind = tensor.shard, linear_kind(tensor.format, Device.MATRIX_UNIT, int8_activations)
    if tensor.is_weight and kind.layout is Layout.PIECES:
        if tensor.are_values:
            groups = tensor.groups(config, chips)
            part = cut_into_pieces(part, None if groups is None else part.shape[1] // groups)
        else:
            part = part.T.contiguous() if part.dim() == 2 else part  # [groups, out], or [out]
            part = part.float()
        axis = axis_in_pieces(axis, part.dim())
    return part.view(torch.int4) if tensor.is_int4 and tensor.are_values else part, axis


def _devices(kind: str, chips: int, cluster: Cluster | None) -> list[Any]:
    """The devices of the mesh. Raises InputError where there is another number of them, or none of this kind."""
    try:
        devices = pjrt.start(kind.lower(), chips, cluster)
    except InputError:
        raise
    except Exception as error:
        if kind == "CPU":
            raise
        raise InputError(
            f"XLA can't use PJRT_DEVICE={kind} ({pjrt.first_line(error)}). Unset PJRT_DEVICE, or set it to CPU to run "
            "on this machine's CPU."
        ) from error
    if kind == "CPU" and cluster is not None and len(devices) != chips:
        raise InputError(
            f"The shards are for {chips} chips, and all processes together have {len(devices)}: the others were given "
            "shards for another number. Give all the same model, and open no other session before."
        )
    if kind == "CPU" and len(devices) < chips:
        raise InputError(
            f"The shards are for {chips} chips, and this process has started XLA with {len(devices)} virtual ones, "
            "which can't be changed any more. Open the larger session first, or in another process."
        )
    if kind != "CPU" and len(devices) != chips:
        raise InputError(
            f"The shards are for {chips} chips and this slice has {len(devices)}. Re-shard them: llama-quantize "
            f"SHARDS --chips {len(devices)} --out OTHER."
        )
    return devices[:chips]


def _has_tpu() -> bool:
    """Whether this machine has a TPU's device files (the kernel's accel driver, or vfio with Google's vendor id)."""
    if glob.glob("/dev/accel[0-9]*"):
        return True
    for path in glob.glob("/sys/bus/pci/devices/*/vendor"):
        with open(path, encoding="ascii") as file:
            if file.read().strip() == "0x1ae0" and glob.glob("/dev/vfio/[0-9]*"):
                return True
    return False


def choose_device() -> str:
    """PJRT_DEVICE or, where unset, what this machine has: CPU, TPU or CUDA. Raises InputError for a TPU that isn't
    there.
    """
    found = "TPU" if _has_tpu() else "CPU"
    asked = os.environ.get("PJRT_DEVICE", "").strip() or found
    kind = asked.upper() if asked.upper() in ("CPU", "TPU", "CUDA") else asked
    # Otherwise libtpu would look for its slice over the network, for minutes.
    if kind == "TPU" and not glob.glob("/dev/accel[0-9]*") and not glob.glob("/dev/vfio/[0-9]*"):
        raise InputError(
            "PJRT_DEVICE is TPU and this machine has none (neither /dev/accel0 nor /dev/vfio/0 and the like are "
            "there). Unset PJRT_DEVICE to run on the CPU."
        )
    return kind
