"""One model's plan as text: its sizes beside the post's formulas, and the slices that hold it."""

from __future__ import annotations

from converters.console.columns import columns
from converters.console.units import format_bytes, format_count, plural
from converters.model.config import ModelConfig
from quantize.shards.partition import plan_heads
from quantize.shards.stored import padding_bytes
from quantize.slices import GENERATIONS, Slice, device_word
from runtime.model.sizing import POST_HBM_BYTES, min_chips, post_cache_bytes, post_parameter_bytes, post_parameters
from runtime.plan.chips import CHIPS, chip_of, describe, slices_of
from runtime.plan.plan import Plan, Workload

# A plan without a target shows chip counts at least up to this one.
_SHOWN_CHIPS = 64
# Generations whose chips are two devices each.
_DOUBLE = tuple(each for each in GENERATIONS if device_word(each) == "device")


def detail(plan: Plan) -> str:
    """One model: sizes beside the formulas, then the target, or every chip count that slices have."""
    lines = [*_sizes(plan), ""]
    if plan.target:
        lines += _on_target(plan)
    elif plan.chips:
        lines += _on_chips(plan)
    else:
        lines += _slices(plan.workload)
    return "\n".join(lines)


def _sizes(plan: Plan) -> list[str]:
    """Exact sizes beside those by the post's formulas."""
    workload, whole = plan.workload, plan.workload.unsplit
    config = workload.config
    shape = (workload.batch_size, workload.max_seq_len)
    formula = post_parameter_bytes(config) + post_cache_bytes(config, *shape)
    hbm, word = format_bytes(CHIPS[plan.generation].hbm_bytes), device_word(plan.generation)
    each = "" if word == "chip" else f" a {word}"
    rows = [
        ("", "exact", "post's formula", ""),
        ("parameters", format_count(workload.parameters), format_count(post_parameters(config)), "12 * dim^2 * layers"),
        (
            "parameter bytes",
            format_bytes(whole.parameter_bytes),
            format_bytes(post_parameter_bytes(config)),
            "bfloat16",
        ),
        (
            "KV cache",
            format_bytes(whole.cache_bytes),
            format_bytes(post_cache_bytes(config, *shape)),
            "layers * 2 * B * S * dim * 2 bytes",
        ),
        ("total", format_bytes(whole.held_bytes), format_bytes(formula), ""),
        (
            f"{word}s at least",
            str(workload.min_chips(plan.generation)),
            str(min_chips(formula, POST_HBM_BYTES)),
            f"total / HBM: {plan.generation} of {hbm}{each}; the post's v4 of {format_bytes(POST_HBM_BYTES)}",
        ),
    ]
    padded = workload.min_padded_chips(plan.generation)
    if padded != workload.min_chips(plan.generation):
        rows.append(
            ("with padding", "more" if padded is None else str(padded), "", "heads of zeros, repeated KV heads")
        )
    head = f"{config.name}, {plural(config.num_layers, 'layer')}, {workload.scheme.title(config)}"
    return [
        f"{head}, batch size {workload.batch_size}, a cache of {plural(workload.max_seq_len, 'token')} in "
        f"{workload.cache_dtype}",
        *columns(rows, left=(0, 3)),
    ]


def _on_target(plan: Plan) -> list[str]:
    target, held = plan.target, plan.placement
    hbm = chip_of(target).hbm_bytes
    bandwidth, word = format_bytes(chip_of(target).hbm_bandwidth), device_word(target.generation)
    lines = [describe(target), *_per_chip(plan)]
    if held.fits(target):
        left = format_bytes(hbm - held.held_bytes)
        lines.append(f"Fits, with {left} of each {word}'s HBM left for XLA's temporaries, which are not counted.")
    else:
        over = format_bytes(held.held_bytes - hbm)
        slices = ", ".join(each.name for each in plan.workload.smallest_slices())
        instead = f"The smallest slices that hold it: {slices}." if slices else "No slice holds it."
        lines.append(f"Does not fit: {over} more than a {word} has. {instead}")
    lines.append(
        f"A decode step takes {held.roofline_ms(target):.2f} ms at least: {format_bytes(held.decode_bytes)} read by "
        f"each {word} at {bandwidth}/s."
    )
    return lines


def _on_chips(plan: Plan) -> list[str]:
    """What shards for a fixed number of chips hold, and the slices with that many chips."""
    matching = [each for generation in GENERATIONS for each in slices_of(generation) if each.devices == plan.chips]
    lines = [f"Shards for {plural(plan.chips, 'chip')}:", *_per_chip(plan)]
    for each in matching:
        verdict = f"at least {plan.placement.roofline_ms(each):.2f} ms a decode step"
        name = each.name if each.devices_per_chip == 1 else f"{each.name}, {each.size}"
        lines.append(f"  {name}: {verdict if plan.placement.fits(each) else 'does not fit'}")
    if not matching:
        lines.append("No slice has so many chips; llama-quantize re-shards for another number.")
    return lines


def _per_chip(plan: Plan) -> list[str]:
    workload, held, word = plan.workload, plan.placement, device_word(plan.generation)
    lines = [
        f"Each {word} holds {format_bytes(held.parameter_bytes)} of parameters and {format_bytes(held.cache_bytes)} of "
        f"cache, {format_bytes(held.held_bytes)} together."
    ]
    config = workload.config
    heads = plan_heads(config.num_heads, config.num_kv_heads, held.chips)
    if (heads.query_places, heads.kv_places) != (config.num_heads, config.num_kv_heads):
        lines.append(
            f"{config.num_heads} query and {config.num_kv_heads} KV heads take {heads.query_places} and "
            f"{heads.kv_places} places (heads of zeros, repeated KV heads)."
        )
    padding = _padding(workload, held.chips)
    return [*lines, f"Padding adds {padding} over all {word}s."] if padding else lines


def _slices(workload: Workload) -> list[str]:
    """Every chip count that slices have: heads, padding, what a chip holds, and where that fits."""
    config = workload.config
    rows = [("chips", "heads", "padding", "parameters", "cache", *GENERATIONS)]
    for chips in _chip_counts(workload):
        held = workload.on(chips)
        heads = plan_heads(config.num_heads, config.num_kv_heads, chips)
        cells = []
        for generation in GENERATIONS:
            slice_ = next((each for each in slices_of(generation) if each.devices == chips), None)
            cells.append(_cell(slice_, workload) if slice_ else "-")
        rows.append(
            (
                str(chips),
                f"{heads.query_places}/{heads.kv_places}",
                _padding(workload, chips) or "none",
                format_bytes(held.parameter_bytes),
                format_bytes(held.cache_bytes),
                *cells,
            )
        )
    return [
        "Slices, with the least time of a decode step (every byte read once from HBM) where weights and cache fit:",
        *columns(rows),
        *(f"{each}: a chip is two devices, each counted as one of the chips here." for each in _DOUBLE),
        f"heads: places that {config.num_heads} query and {config.num_kv_heads} KV heads take; none is padded or "
        f"repeated on {_even_splits(config)} chips.",
    ]


def _cell(slice_: Slice, workload: Workload) -> str:
    held = workload.on(slice_.devices)
    return f"{slice_.name} {held.roofline_ms(slice_):.2f} ms" if held.fits(slice_) else f"{slice_.name} too small"


def _chip_counts(workload: Workload) -> list[int]:
    """The chip counts of slices, up to 64 or to that of the largest of ``smallest_slices``."""
    most = max(_SHOWN_CHIPS, *(each.devices for each in workload.smallest_slices()))
    counts = {each.devices for generation in GENERATIONS for each in slices_of(generation)}
    return sorted(count for count in counts if count <= most)


def _even_splits(config: ModelConfig) -> str:
    """The numbers of chips over which KV heads, and with them query heads, divide evenly."""
    kv_heads = config.num_kv_heads
    return ", ".join(str(chips) for chips in range(1, kv_heads + 1) if kv_heads % chips == 0)


def _padding(workload: Workload, chips: int) -> str:
    """The bytes that splitting over ``chips`` adds to the parameters, and their share; empty where it adds none."""
    extra = padding_bytes(workload.config, workload.scheme, chips)
    return f"{format_bytes(extra)} ({extra / workload.unsplit.parameter_bytes:.1%})" if extra else ""
