"""Every preset's plan as one table: beside the post's Table 2, or on one slice."""

from __future__ import annotations

from collections.abc import Sequence

from converters.console.columns import columns
from converters.console.units import format_bytes, plural
from quantize.slices import device_word
from runtime.plan.chips import GB, describe
from runtime.plan.plan import DEFAULT_GENERATION, Plan, Workload

# Table 2 of the post: MB of parameters (the models' names times 2 bytes), MB of cache, GB in total, TPU v4 chips.
POST_TABLE = {
    "7B": (14_000, 134, 14.128, 1),
    "33B": (66_000, 408, 66.41, 3),
    "65B": (130_000, 671, 130.67, 5),
    "175B": (350_000, 1_208, 351.21, 11),
}


def overview(plans: Sequence[Plan]) -> str:
    """The post's Table 2 for several models and schemes, with the post's rounded figures beside exact ones."""
    rows = [("", "", "", "parameters", "", "cache", "", "total", "", "v4 chips", "", "smallest slices")]
    rows.append(("model", "scheme", "parameters", "MB", "post", "MB", "post", "GB", "post", "", "post", "that hold it"))
    for plan in plans:
        workload, whole = plan.workload, plan.workload.unsplit
        name, scheme = workload.config.name, workload.scheme.name
        post = _post_row(workload)
        rows.append(
            (
                name,
                scheme,
                f"{workload.parameters:,}",
                f"{whole.parameter_bytes / 10**6:,.0f}",
                post[0],
                f"{whole.cache_bytes / 10**6:,.0f}",
                post[1],
                f"{whole.held_bytes / GB:,.2f}",
                post[2],
                str(workload.min_chips(DEFAULT_GENERATION)),
                post[3],
                " ".join(each.name for each in workload.smallest_slices()) or "none",
            )
        )
    shape = plans[0].workload
    return "\n".join(
        (
            f"Table 2 of the post beside exact sizes: batch size {shape.batch_size}, a cache of "
            f"{plural(shape.max_seq_len, 'token')} in {shape.cache_dtype}; 1 GB is 10^9 bytes",
            *columns(rows, left=(0, 1, 11)),
            "post: its published, rounded figures (bfloat16, batch size 1, 256 tokens).",
            "v4 chips: total / 32 GB, before padding. Slices hold weights, cache and padding; not XLA's temporaries.",
        )
    )


def overview_on(plans: Sequence[Plan]) -> str:
    """Several models and schemes on one slice: what each device holds, and the roofline."""
    target = plans[0].target
    word = device_word(target.generation)
    rows = [("model", "scheme", f"parameters per {word}", f"cache per {word}", "fits", "decode step at least")]
    for plan in plans:
        held = plan.placement
        rows.append(
            (
                plan.workload.config.name,
                plan.workload.scheme.name,
                format_bytes(held.parameter_bytes),
                format_bytes(held.cache_bytes),
                "yes" if held.fits(target) else "no",
                f"{held.roofline_ms(target):.2f} ms",
            )
        )
    shape = plans[0].workload
    return "\n".join(
        (
            f"{describe(target)}; batch size {shape.batch_size}, a cache of {plural(shape.max_seq_len, 'token')} in "
            f"{shape.cache_dtype}",
            *columns(rows, left=(0, 1)),
        )
    )


def _post_row(workload: Workload) -> tuple[str, str, str, str]:
    """The post's published figures if they are for exactly this workload, else dashes."""
    figures = POST_TABLE.get(workload.config.name)
    shape = (workload.batch_size, workload.max_seq_len, workload.cache_dtype)
    same = (workload.scheme.name, *shape) == ("bf16", 1, 256, "bfloat16")
    if figures is None or not same:
        return ("-", "-", "-", "-")
    parameters, cache, total, chips = figures
    return (f"{parameters:,}", f"{cache:,}", str(total), str(chips))
