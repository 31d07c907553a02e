"""The compiler's verdict as text. Its figures are called estimates: they come from a cost model, not from a chip."""

from __future__ import annotations

from converters.console.columns import columns
from converters.console.units import format_bytes, plural
from quantize.slices import Slice, device_word
from runtime.devices.backend import CacheUse
from runtime.plan.chips import chip_of
from runtime.plan.compiled_plan import CompiledGraph, CompiledPlan, Prediction
from runtime.plan.latency import FITTED_GENERATION, PUBLISHED, latency_model


def compiled_lines(compiled: CompiledPlan) -> list[str]:
    """The decode step's verdict and the prediction of its time, then a verdict for each bucket."""
    target, prediction = compiled.target, compiled.prediction
    lines = [f"The TPU's compiler, asked for {target.name} (no TPU was used), per {device_word(target.generation)}:"]
    lines += _graph("decode step", compiled.step, target)
    lines += [f"    {line}" for line in _times(compiled.step, prediction, target)]
    if prediction is not None:
        lines.append(f"    {_prediction(prediction, target)}")
    filled = {f"bucket of {plural(size, 'token')}": graph for size, graph in compiled.buckets.items()}
    if compiled.later_section:
        filled[f"later sections of longer prompts, {plural(max(compiled.buckets), 'token')}"] = compiled.later_section
    for title, graph in filled.items():
        lines += _graph(title, graph, target)
        lines += [f"    {line}" for line in _times(graph, None, target)]
    if compiled.compile_cache is not None:
        lines.append(f"  compile cache: {_cache(compiled.compile_cache)}")
    return lines


def _cache(use: CacheUse) -> str:
    failed = f", {use.failures} there but of no use" if use.failures else ""
    return f"{plural(use.hits, 'program')} found, {use.misses} new{failed}"


def _graph(title: str, graph: CompiledGraph, target: Slice) -> list[str]:
    if graph.program is None:
        return [f"  {title}: does not compile: {graph.out_of_memory}"]
    program, hbm = graph.program, chip_of(target).hbm_bytes
    verdict = "fits" if program.peak_bytes <= hbm else "does not fit"
    moved = ", ".join(f"{count} {kind} of {format_bytes(size)}" for kind, (count, size) in graph.collectives.items())
    return [
        f"  {title}: {verdict}, {format_bytes(program.peak_bytes)} at once of {format_bytes(hbm)}: arguments "
        f"{format_bytes(program.argument_bytes)}, temporaries {format_bytes(program.temp_bytes)}, outputs "
        f"{format_bytes(program.output_bytes)}, of which {format_bytes(program.alias_bytes)} over arguments",
        f"    collectives: {moved or 'none'}; weights written out dequantized: {graph.dequantized_weights}; "
        f"compiled in {program.compile_s:.1f} s",
    ]


def _times(graph: CompiledGraph, prediction: Prediction | None, target: Slice) -> list[str]:
    """The estimate for each kind of work, beside the time of reading its bytes."""
    priced = graph.estimate
    if priced is None:
        return [] if graph.program is None else [f"no estimate of time: {target.generation}'s clock is not published"]
    rows = [("", "estimate, ms", "roofline, ms", "gap, ms", "instructions")]
    for kind, share in priced.shares.items():
        rows.append((kind.value, *_gap(1000 * share.estimated_s, 1000 * share.roofline_s), str(share.instructions)))
    rows.append(("all of these", *_gap(graph.estimated_ms, 1000 * graph.roofline_s), ""))
    if prediction is not None:
        rows.append(("collectives, predicted", *_gap(prediction.collectives_ms, 0.0), str(graph.collective_count)))
    filled = f"filled from bytes over bandwidth ({1000 * priced.unpriced_s:.3f} ms)"
    incomplete = f" Incomplete: no time is known of {priced.unknown}." if priced.unknown else ""
    count = sum(priced.unpriced.values())
    return [
        *columns(rows),
        f"An estimate by the compiler's cost model; {plural(count, 'instruction')} had none and "
        f"{'was' if count == 1 else 'were'} {filled}.{incomplete}",
    ]


def _gap(estimated_ms: float, roofline_ms: float) -> tuple[str, str, str]:
    return f"{estimated_ms:.3f}", f"{roofline_ms:.3f}", f"{estimated_ms - roofline_ms:.3f}"


def _prediction(prediction: Prediction, target: Slice) -> str:
    model = latency_model()
    computation = "the estimate" if chip_of(target).clock_hz else "the roofline, since there is no estimate,"
    elsewhere = (
        "" if target.generation == FITTED_GENERATION else f", all of {FITTED_GENERATION}, not of this generation"
    )
    return (
        f"Prediction: {prediction.ms:.2f} ms a step, {computation} and {prediction.collectives_ms:.2f} ms of "
        f"collectives. The {len(PUBLISHED)} published times{elsewhere}, each left out of the fit in turn, are "
        f"predicted with an error of {model.mean_error:.0%} on average and {model.worst_error:.0%} at worst; the form "
        "of the model was chosen on these same times."
    )
