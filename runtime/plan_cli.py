"""llama-plan: what a model needs from a TPU, and which slices hold it, before any weights exist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.console.command import DISTRIBUTION, run
from quantize.format_options import KIND_FLAGS, AskedFormat, format_options
from runtime.model.sizing import ACTIVATIONS, CACHE_DTYPES

if TYPE_CHECKING:
    from converters.model.config import ModelConfig
    from quantize.shards.scheme import Scheme
    from quantize.slices import Slice
    from runtime.plan.compiled_plan import CompiledPlan
    from runtime.plan.plan import Workload

Shape = tuple[int, int, str]  # batch size, length of the KV cache, its dtype

_MOST = 1 << 24  # far above any batch or sequence, low enough that every figure can be displayed


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--config",
    "config_name",
    metavar="NAME|FILE",
    help="A preset (tiny, 7B ... 175B, llama-3-8b ..., opt-175b) or a config.json.",
)
@click.option(
    "--shards",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="What llama-quantize wrote: model, scheme and chips are taken from there.",
)
@format_options
@click.option("--target", metavar="SLICE", help="A TPU slice, v4-16 (8 chips) for instance.")
@click.option("--batch-size", type=click.IntRange(1, _MOST), default=1, show_default=True, help="Rows decoded at once.")
@click.option(
    "--max-seq-len", type=click.IntRange(1, _MOST), default=256, show_default=True, help="Length of the KV cache."
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", *CACHE_DTYPES]),
    default="auto",
    show_default=True,
    help="Of the KV cache; auto is bfloat16.",
)
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="auto",
    show_default=True,
    help="With --compile, as llama-run's option: int8 for int8 and int4 weights with one scale per output channel.",
)
@click.option(
    "--compile",
    "compile_",
    is_flag=True,
    help="Ask the TPU's own compiler, which needs no TPU (extra [tpu]); with --target.",
)
@click.option("--buckets", metavar="128,256", help="With --compile: prompt buckets to compile as well.")
@click.option(
    "--compile-cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="With --compile: keep compiled programs here, for llama-run on that slice. Give none that others write to.",
)
@click.option("--json", "json_out", metavar="FILE|-", help="Write the plan as JSON; - for stdout, in place of text.")
@click.version_option(package_name=DISTRIBUTION)
def command(
    config_name: str | None,
    shards: Path | None,
    kind: str | None,
    group_size: str | None,
    zero_points: bool,
    target: str | None,
    batch_size: int,
    max_seq_len: int,
    kv_cache_dtype: str,
    activations: str,
    compile_: bool,
    buckets: str | None,
    compile_cache: Path | None,
    json_out: str | None,
) -> None:
    """Say how large a model is, what each chip of a slice holds of it, and what a decode step takes at least.

    \b
    llama-plan                                     the post's Table 2, exactly, in every format
    llama-plan --config 33B --int8                 which slices hold it, and what padding its heads costs
    llama-plan --config 175B --int8 --target v4-16
    llama-plan --config 175B --int8 --target v4-16 --compile     the TPU compiler's verdict, without a TPU
    """
    from converters.console.errors import InputError
    from quantize.slices import find_slice
    from runtime.devices.compile_cache import check_folder
    from runtime.json_out import check_json_out

    if config_name is not None and shards is not None:
        raise InputError("Give --config or --shards, not both.")
    if kind is None and (group_size or zero_points):
        raise InputError(f"--group-size and --zero-points are for a format: give {KIND_FLAGS} with them.")
    asked = AskedFormat(kind, group_size, zero_points)
    shape = (batch_size, max_seq_len, "bfloat16" if kv_cache_dtype == "auto" else kv_cache_dtype)
    slice_ = find_slice(target) if target is not None else None
    check_json_out(json_out)
    if compile_ and (slice_ is None or (config_name is None and shards is None)):
        raise InputError("--compile is for one model on one slice: give --config or --shards, and --target.")
    if buckets is not None and not compile_:
        raise InputError("--buckets are compiled prompts; give --compile with them.")
    if activations != "auto" and not compile_:
        raise InputError("--activations changes only what is compiled; give --compile with it.")
    if compile_cache is not None:
        if not compile_:
            raise InputError("--compile-cache keeps compiled programs; give --compile with it.")
        check_folder(compile_cache)
    sizes = _buckets(buckets, max_seq_len) if compile_ else None
    if config_name is None and shards is None:
        text, content = _presets(asked, slice_, shape)
    else:
        text, content = _model(config_name, shards, asked, slice_, shape, sizes, compile_cache, activations)
    _put(text, content, json_out)


def _presets(asked: AskedFormat, target: Slice | None, shape: Shape) -> tuple[str, Any]:
    """Text and JSON of every preset, in one kind of format or in all: ``{"bf16": [plan, ...], "int8": [...], ...}``.

    Those whose learned positions end before the cache are left out.
    """
    from converters.model.families.presets import PRESETS
    from quantize.formats.table import KINDS
    from runtime.plan.plan import Plan, Workload
    from runtime.plan.plan_overview import overview, overview_on

    kinds = ["bf16", *(kind for kind in KINDS if kind != "bf16")] if asked.kind is None else [asked.kind]
    plans = {kind: [] for kind in kinds}
    shown = []
    for config in PRESETS.values():
        for kind in kinds if config.holds_context(shape[1]) else []:
            scheme = replace(asked, kind=kind).scheme(config)
            plans[kind].append(Plan(Workload(config, scheme, *shape), target))
            shown.append(plans[kind][-1])
    content = {kind: [plan.to_json() for plan in found] for kind, found in plans.items()}
    return (overview_on if target else overview)(shown), content


def _model(
    config_name: str | None,
    shards: Path | None,
    asked: AskedFormat,
    target: Slice | None,
    shape: Shape,
    buckets: tuple[int, ...] | None,
    compile_cache: Path | None,
    activations: str,
) -> tuple[str, Any]:
    """Text and JSON of one model's plan, with the compiler's verdict where ``buckets`` (maybe none) are given."""
    from runtime.plan.plan import Plan, Workload
    from runtime.plan.plan_text import detail

    if shards is None:
        config, chips = _read_config(config_name), None
        scheme = asked.scheme(config)
    else:
        config, scheme, chips = _read_shards(shards, asked, target)
    config.check_context(shape[1])
    workload = Workload(config, scheme, *shape, activations)
    if target is None and chips is None:
        workload.require_slice()
    if buckets is None:
        plan = Plan(workload, target, chips)
        return detail(plan), plan.to_json()
    compiled = _compiled(workload, target, buckets, compile_cache)
    plan = Plan(workload, target, chips, compiled.to_json())
    from runtime.plan.compiled_text import compiled_lines

    return "\n".join([detail(plan), "", *compiled_lines(compiled)]), plan.to_json()


def _compiled(workload: Workload, target: Slice, buckets: tuple[int, ...], compile_cache: Path | None) -> CompiledPlan:
    """The compiler's verdict. Raises InputError where it isn't installed, before anything slow is loaded, and where the
    weights don't allow the activations.
    """
    from converters.console.progress import spinner
    from runtime.plan.tpu_compiler import require_libtpu

    require_libtpu()
    from runtime.model.linears.table import check_activations
    from runtime.plan.compiled_plan import compile_plan

    check_activations(workload.activations, workload.scheme.formats)
    with spinner(f"Compiling for {target.name}"):
        return compile_plan(workload, target, buckets, compile_cache=compile_cache)


def _buckets(text: str | None, max_seq_len: int) -> tuple[int, ...]:
    """The lengths in --buckets that the cache holds."""
    from runtime.run.buckets import parse_buckets, usable_buckets

    return () if text is None else tuple(usable_buckets(parse_buckets(text), max_seq_len))


def _read_config(config_name: str) -> ModelConfig:
    """The configuration that --config names, in bfloat16, which llama-convert writes by default."""
    from converters.model.families.hf_config import read_config
    from converters.model.families.presets import find_config

    found = find_config(config_name)
    return (read_config(found) if isinstance(found, Path) else found).with_dtype("bfloat16")


def _read_shards(directory: Path, asked: AskedFormat, target: Slice | None) -> tuple[ModelConfig, Scheme, int]:
    """Model, scheme and chips of a manifest. Raises InputError where an option contradicts it."""
    from converters.console.errors import InputError
    from quantize.shards.reading import Shards

    shards = Shards(directory)
    scheme = shards.manifest.scheme
    if not asked.agrees(scheme):
        made = f"were made with {scheme.flags}" if scheme.flags else "are of several formats"
        raise InputError(f"{asked.flags} contradicts {directory}, whose shards {made}.")
    if target is not None and target.devices != shards.chips:
        has = target.devices if target.devices_per_chip == 1 else target.size
        raise InputError(
            f"{directory} has shards for {shards.chips} chips and {target.name} has {has}. Re-shard them: "
            f"llama-quantize {directory} --target {target.name} --out OTHER."
        )
    return shards.config, scheme, shards.chips


def _put(text: str, content: Any, json_out: str | None) -> None:
    """Write the text to stdout and the JSON to its file, or only the JSON to stdout."""
    from runtime.json_out import STDOUT, write_json_out

    if json_out != STDOUT:
        click.echo(text)
    if json_out is not None:
        write_json_out(json_out, content)


def main() -> None:
    """The console script."""
    run(command)
