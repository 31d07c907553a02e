"""llama-plan: what a model needs from a TPU, and which slices hold it, before any weights exist."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.console.command import DISTRIBUTION, run

if TYPE_CHECKING:
    from converters.model.config import ModelConfig
    from quantize.shards.stored import Scheme
    from quantize.slices import Slice
    from runtime.plan.compiled_plan import CompiledPlan
    from runtime.plan.plan import Workload

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
@click.option("--int8", "int8", is_flag=True, help="Linear layers in int8, one scale per output channel.")
@click.option("--bf16", "bf16", is_flag=True, help="Everything in bfloat16. [default, as in the post]")
@click.option("--target", metavar="SLICE", help="A TPU slice, v4-16 (8 chips) for instance.")
@click.option("--batch-size", type=click.IntRange(1, _MOST), default=1, show_default=True, help="Rows decoded at once.")
@click.option(
    "--max-seq-len", type=click.IntRange(1, _MOST), default=256, show_default=True, help="Length of the KV cache."
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
    int8: bool,
    bf16: bool,
    target: str | None,
    batch_size: int,
    max_seq_len: int,
    compile_: bool,
    buckets: str | None,
    compile_cache: Path | None,
    json_out: str | None,
) -> None:
    """Say how large a model is, what each chip of a slice holds of it, and what a decode step takes at least.

    \b
    llama-plan                                     the post's Table 2, exactly, in bfloat16 and int8
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
    if int8 and bf16:
        raise InputError("Give --int8 or --bf16, not both.")
    scheme = "int8" if int8 else "bf16" if bf16 else None
    slice_ = find_slice(target) if target is not None else None
    check_json_out(json_out)
    if compile_ and (slice_ is None or (config_name is None and shards is None)):
        raise InputError("--compile is for one model on one slice: give --config or --shards, and --target.")
    if buckets is not None and not compile_:
        raise InputError("--buckets are compiled prompts; give --compile with them.")
    if compile_cache is not None:
        if not compile_:
            raise InputError("--compile-cache keeps compiled programs; give --compile with it.")
        check_folder(compile_cache)
    sizes = _buckets(buckets, max_seq_len) if compile_ else None
    if config_name is None and shards is None:
        text, content = _presets(scheme, slice_, batch_size, max_seq_len)
    else:
        text, content = _model(config_name, shards, scheme, slice_, batch_size, max_seq_len, sizes, compile_cache)
    _put(text, content, json_out)


def _presets(scheme: str | None, target: Slice | None, batch_size: int, max_seq_len: int) -> tuple[str, Any]:
    """Text and JSON of every preset, in one scheme or in both: ``{"bf16": [plan, ...], "int8": [plan, ...]}``.

    Those whose learned positions end before ``max_seq_len`` are left out.
    """
    from converters.model.families.presets import PRESETS
    from quantize.shards.stored import Scheme
    from runtime.plan.plan import Plan, Workload
    from runtime.plan.plan_overview import overview, overview_on

    schemes = [scheme] if scheme else ["bf16", "int8"]
    plans = [
        Plan(Workload(config, Scheme(name), batch_size, max_seq_len), target)
        for config in PRESETS.values()
        if config.holds_context(max_seq_len)
        for name in schemes
    ]
    content = {name: [plan.to_json() for plan in plans if plan.workload.scheme.name == name] for name in schemes}
    return (overview_on if target else overview)(plans), content


def _model(
    config_name: str | None,
    shards: Path | None,
    scheme: str | None,
    target: Slice | None,
    batch_size: int,
    max_seq_len: int,
    buckets: tuple[int, ...] | None,
    compile_cache: Path | None,
) -> tuple[str, Any]:
    """Text and JSON of one model's plan, with the compiler's verdict where ``buckets`` (maybe none) are given."""
    from quantize.shards.stored import Scheme
    from runtime.plan.plan import Plan, Workload
    from runtime.plan.plan_text import detail

    if shards is None:
        config, chosen, chips = _read_config(config_name), Scheme(scheme or "bf16"), None
    else:
        config, chosen, chips = _read_shards(shards, scheme, target)
    config.check_context(max_seq_len)
    workload = Workload(config, chosen, batch_size, max_seq_len)
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
    """The compiler's verdict. Raises InputError where it isn't installed, before anything slow is loaded."""
    from converters.console.progress import spinner
    from runtime.plan.tpu_compiler import require_libtpu

    require_libtpu()
    from runtime.plan.compiled_plan import compile_plan

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


def _read_shards(directory: Path, asked: str | None, target: Slice | None) -> tuple[ModelConfig, Scheme, int]:
    """Model, scheme and chips of a manifest. Raises InputError where an option contradicts it."""
    from converters.console.errors import InputError
    from quantize.shards.reading import Shards

    shards = Shards(directory)
    scheme = shards.manifest.scheme
    if asked not in (None, scheme.name):
        raise InputError(f"--{asked} contradicts {directory}, whose shards were made with --{scheme.name}.")
    if target is not None and target.devices != shards.chips:
        has = target.devices if target.devices_per_chip == 1 else target.size
        raise InputError(
            f"{directory} has shards for {shards.chips} chips and {target.name} has {has}. Re-shard them: "
            f"llama-quantize {directory} --{scheme.name} --target {target.name} --out OTHER."
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
