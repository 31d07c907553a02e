"""The compiler's verdict as text. Its figures are called estimates: they come from a cost model, not from a chip."""

from __future__ import annotations

from converters.units import format_bytes, plural
from quantize.targets import Slice
from runtime.columns import columns
from runtime.compiled_plan import CompiledGraph, CompiledPlan
from runtime.topology import chip_of


def compiled_lines(compiled: CompiledPlan, target: Slice) -> list[str]:
    """The decode step's verdict, then a line for each bucket."""
    lines = [f"The TPU's compiler, asked for {target.name} (no TPU was used), per chip:"]
    lines += _graph("decode step", compiled.step, target)
    for size, graph in compiled.buckets.items():
        lines += _graph(f"bucket of {plural(size, 'token')}", graph, target)
    return lines


def _graph(title: str, graph: CompiledGraph, target: Slice) -> list[str]:
    if graph.program is None:
        return [f"  {title}: does not compile: {graph.out_of_memory}"]
    program, hbm = graph.program, chip_of(target).hbm_bytes
    verdict = "fits" if program.peak_bytes <= hbm else "does not fit"
    moved = ", ".join(f"{count} {kind} of {format_bytes(size)}" for kind, (count, size) in graph.collectives.items())
    lines = [
        f"  {title}: {verdict}, {format_bytes(program.peak_bytes)} at once of {format_bytes(hbm)}: arguments "
        f"{format_bytes(program.argument_bytes)}, temporaries {format_bytes(program.temp_bytes)}, outputs "
        f"{format_bytes(program.output_bytes)}, of which {format_bytes(program.alias_bytes)} over arguments",
        f"    collectives: {moved or 'none'}; int8 weights written out dequantized: {graph.dequantized_weights}; "
        f"compiled in {program.compile_s:.1f} s",
    ]
    if graph.estimate is None:
        return [*lines, f"    no estimate of time: the clock of {target.generation} is not published"]
    return [*lines, *(f"    {line}" for line in _times(graph))]


def _times(graph: CompiledGraph) -> list[str]:
    """The estimate by kind of work, beside the time of reading its bytes."""
    priced = graph.estimate
    rows = [("", "estimate, ms", "roofline, ms", "instructions")]
    for kind, share in priced.shares.items():
        times = (f"{1000 * share.estimated_s:.3f}", f"{1000 * share.roofline_s:.3f}")
        rows.append((kind.value, *times, str(share.instructions)))
    rows.append(("all, without collectives", f"{graph.estimated_ms:.3f}", f"{1000 * graph.roofline_s:.3f}", ""))
    filled = f"filled from bytes over bandwidth ({1000 * priced.unpriced_s:.3f} ms)"
    incomplete = f" Incomplete: no time is known of {priced.unknown}." if priced.unknown else ""
    return [
        *columns(rows),
        f"An estimate by the compiler's cost model; {plural(sum(priced.unpriced.values()), 'instruction')} had none "
        f"and {'was' if sum(priced.unpriced.values()) == 1 else 'were'} {filled}.{incomplete}",
    ]
