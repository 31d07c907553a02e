"""What the TPU's compiler says about the graphs that llama-run executes, for a slice that need not be present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from quantize.slices import Slice
from runtime.devices.backend import CacheUse
from runtime.devices.pjrt import OutOfMemory
from runtime.devices.tracing import TracedGraph
from runtime.devices.xla import TPU_LEAST_ROWS, TPUForm
from runtime.model.decoder_tensors import collect, decoder_parameters
from runtime.model.graphs import CACHE_ARGUMENT, MakeGraph, fill_graph, greedy_graph, later_fill_graph
from runtime.plan.chips import chip_of
from runtime.plan.estimate import Estimate, estimate
from runtime.plan.hlo import Instruction, Module, parse_module
from runtime.plan.latency import FITTED_GENERATION, latency_model
from runtime.plan.plan import Workload
from runtime.plan.tpu_compiler import CompiledProgram, TPUCompiler
from runtime.run.buckets import has_later_sections
from runtime.run.load import make_cache, make_decoder

_FLOATING = ("bf16", "f16", "f32")
_QUANTIZED = ("s8", "s4", "u4", "f8e4m3fn")
# The JSON keys of a compiled graph.
_KEYS = (
    "fits", "out_of_memory", "argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "peak_bytes", "all_reduce",
    "all_gather", "collectives", "dequantized_weights", "cycles", "estimated_ms", "compile_s", "by_kind_ms",
    "unpriced_instructions", "complete",
)  # fmt: skip


@dataclass(frozen=True)
class CompiledGraph:
    """One graph compiled for one chip of a slice. ``out_of_memory`` is the compiler's message where it refused."""

    program: CompiledProgram | None
    estimate: Estimate | None  # None where the generation's clock isn't published
    collectives: dict[str, tuple[int, int]]  # for each kind its count and bytes
    dequantized_weights: int  # quantized weights that are written to memory as wider floats
    out_of_memory: str | None = None
    roofline_s: float = 0.0
    cycles: int = 0  # by the compiler's cost model, of all instructions that it gives some

    @property
    def estimated_ms(self) -> float | None:
        """The cost model's time, or the roofline where that is longer; without collectives, which have no price."""
        return None if self.estimate is None else 1000 * max(self.estimate.estimated_s, self.roofline_s)

    @property
    def collective_count(self) -> int:
        return sum(count for count, _ in self.collectives.values())

    def to_json(self, hbm_bytes: int) -> dict[str, Any]:
        """The verdict under the keys that scripts rely on, which are the same in every case.

        Where the program doesn't compile, all values but ``fits`` and ``out_of_memory`` are None; where there is no
        estimate, those derived from it are.
        """
        program, priced = self.program, self.estimate
        content = dict.fromkeys(_KEYS) | {"fits": False, "out_of_memory": self.out_of_memory}
        if program is not None:
            content |= {
                "fits": program.peak_bytes <= hbm_bytes,
                "argument_bytes": program.argument_bytes,
                "output_bytes": program.output_bytes,
                "alias_bytes": program.alias_bytes,
                "temp_bytes": program.temp_bytes,
                "peak_bytes": program.peak_bytes,
                "all_reduce": self.collectives.get("all-reduce", (0, 0))[0],
                "all_gather": self.collectives.get("all-gather", (0, 0))[0],
                "collectives": {name: {"count": c, "bytes": b} for name, (c, b) in self.collectives.items()},
                "dequantized_weights": self.dequantized_weights,
                "estimated_ms": self.estimated_ms,
                "compile_s": program.compile_s,
            }
            content["cycles"] = self.cycles
        if priced is not None:
            content["by_kind_ms"] = {
                kind.value: {"estimated": 1000 * share.estimated_s, "roofline": 1000 * share.roofline_s}
                for kind, share in priced.shares.items()
            }
            content["unpriced_instructions"] = priced.unpriced
            content["complete"] = priced.complete
        return content


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a decode step: computation as the compiler estimates it, collectives by ``latency.py``."""

    computation_ms: float  # the roofline where the compiler's cycles can't be turned into time
    collectives_ms: float

    @property
    def ms(self) -> float:
        return self.computation_ms + self.collectives_ms

    def to_json(self) -> dict[str, Any]:
        model = latency_model()
        return {
            "ms": self.ms,
            "computation_ms": self.computation_ms,
            "collectives_ms": self.collectives_ms,
            "leave_one_out_mean_error": model.mean_error,
            "leave_one_out_worst_error": model.worst_error,
            "fitted_on": FITTED_GENERATION,
        }


@dataclass(frozen=True)
class CompiledPlan:
    """The decode step, the prompt buckets by length, and the later sections of prompts longer than the largest."""

    target: Slice
    step: CompiledGraph
    buckets: dict[int, CompiledGraph]
    later_section: CompiledGraph | None  # None without buckets, or if no prompt exceeds the largest
    compile_cache: CacheUse | None = None  # None without one

    @property
    def prediction(self) -> Prediction | None:
        """The prediction of the step's time; None where the step doesn't compile."""
        if self.step.program is None:
            return None
        collectives_s = latency_model().collectives_s(self.step.collective_count, self.target.devices)
        return Prediction(self.step.estimated_ms or 1000 * self.step.roofline_s, 1000 * collectives_s)

    def to_json(self) -> dict[str, Any]:
        hbm_bytes = chip_of(self.target).hbm_bytes
        content = self.step.to_json(hbm_bytes)
        content["prediction"] = self.prediction and self.prediction.to_json()
        if self.buckets:
            content["buckets"] = {str(size): each.to_json(hbm_bytes) for size, each in self.buckets.items()}
        if self.later_section:
            content["later_section"] = self.later_section.to_json(hbm_bytes)
        if self.compile_cache:
            content["compile_cache"] = self.compile_cache._asdict()
        return content


def compile_plan(
    workload: Workload,
    target: Slice,
    buckets: Sequence[int] = (),
    least_rows: int = TPU_LEAST_ROWS,
    compile_cache: Path | None = None,
) -> CompiledPlan:
    """Trace a workload's decode step and buckets as llama-run does, and compile them for ``target`` at full depth.

    ``compile_cache`` is a folder in which the programs are kept and found. Raises InputError where the compiler isn't
    installed.
    """
    compiler, slots = TPUCompiler(target, compile_cache), workload.max_seq_len

    def compiled(make: MakeGraph, tokens: int, seen: int, least_rows: int = TPU_LEAST_ROWS) -> CompiledGraph:
        graph = trace_graph(workload, target.devices, make, tokens, least_rows)
        rows = workload.batch_size * tokens
        return _compile(compiler, graph, make.__name__, replace(workload, max_seq_len=seen), target, rows)

    step = compiled(greedy_graph, 1, slots, least_rows)
    filled = {size: compiled(fill_graph, size, size) for size in buckets}
    is_long = bool(buckets) and has_later_sections(buckets, slots)
    later = compiled(later_fill_graph, buckets[-1], slots) if is_long else None
    return CompiledPlan(target, step, filled, later, compiler.cache_use)


def trace_graph(
    workload: Workload,
    chips: int,
    make: MakeGraph,
    tokens: int,
    least_rows: int = TPU_LEAST_ROWS,
    dtype: torch.dtype = torch.bfloat16,
) -> TracedGraph:
    """Trace a graph of ``graphs.py`` for ``tokens`` tokens per row; ``dtype`` is that of activations."""
    config, rows = workload.config, workload.batch_size
    slice_ = TPUForm(chips, least_rows, workload.activations == "int8")
    with torch.no_grad():
        wanted = decoder_parameters(config, workload.scheme, chips, slice_.fuse_bytes)
        parameters = collect(wanted, lambda tensor: slice_.load(config, tensor))
        decoder = make_decoder(config, dtype, slice_, parameters)
        cache = make_cache(config, slice_, rows, workload.max_seq_len, getattr(torch, workload.cache_dtype))
        shapes = ((rows, tokens), (tokens,), (rows,))  # tokens, slots, offsets
        arguments = [slice_.zeros(shape, torch.long, None) for shape in shapes]
        graph, exact = make(decoder, slice_.cache_type), dtype == torch.float32
        return slice_.tracer.trace(graph, (*arguments, cache.layers), CACHE_ARGUMENT, exact).graph


def _compile(
    compiler: TPUCompiler, graph: TracedGraph, name: str, workload: Workload, target: Slice, rows: int
) -> CompiledGraph:
    """Compile and price a graph of so many rows of activations; ``workload.max_seq_len`` is the number of cache slots
    that it attends to.
    """
    try:
        program = compiler.compile(graph, name)
    except OutOfMemory as error:
        return CompiledGraph(None, None, {}, 0, str(error))
    module, chip = parse_module(program.text), chip_of(target)
    priced = estimate(module, chip, frozenset(program.donated), workload.max_seq_len)
    return CompiledGraph(
        program,
        priced if chip.clock_hz else None,
        {name: (each.count, each.nbytes) for name, each in priced.collectives.items()},
        dequantized_weights(module, rows),
        roofline_s=workload.on(target.devices).decode_bytes / chip.hbm_bandwidth,
        cycles=priced.cycles,
    )


def dequantized_weights(module: Module, rows: int = 0) -> int:
    """The number of results outside fusions that have the sizes of a quantized weight and a wider floating dtype.

    A weight in groups [groups, group size, out] may also have become a matrix. Weights with an axis as long as there
    are ``rows`` of activations are left out: these have the same sizes. So may other weights that are not quantized at
    all: fetching those doesn't count.
    """
    weights = set()
    for each in module.entry.parameters.values():
        for array in each.results:
            if array.dtype in _QUANTIZED and len(array.dims) in (2, 3):
                weights |= {tuple(sorted(array.dims)), tuple(sorted((prod(array.dims[:-1]), array.dims[-1])))}
    weights = {sizes for sizes in weights if rows not in sizes}
    return sum(
        array.dtype in _FLOATING and tuple(sorted(size for size in array.dims if size > 1)) in weights
        for each in module.entry.instructions.values()
        if not _is_floating_parameter(module.entry.source(each))
        for array in each.results
    )


def _is_floating_parameter(instruction: Instruction) -> bool:
    return instruction.parameter is not None and all(array.dtype in _FLOATING for array in instruction.results)
