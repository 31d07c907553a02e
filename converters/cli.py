"""llama-convert: makes a checkpoint directory from a preset, another layout, a GGUF file or shards."""

from __future__ import annotations

from pathlib import Path

import click

from converters.console.command import DISTRIBUTION, run
from converters.model.dtypes import DTYPES


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--config",
    "config_name",
    metavar="NAME|FILE",
    help="Random weights of a preset (tiny, 7B ..., llama-2-7b ..., opt-125m ...) or a config.json.",
)
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE",
    help="A directory of Hugging Face's or Meta's, a .gguf file, or shards.",
)
@click.option("--out", type=click.Path(path_type=Path), default="checkpoint", show_default=True, help="Where to write.")
@click.option(
    "--storage",
    type=click.Choice(["auto", "files", "seed"]),
    default="auto",
    show_default=True,
    help="Random weights as files, as their seed, or as files where they fit.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the random weights.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of the weights written.  [default: the source's own; bfloat16 for quantized GGUF files and presets]",
)
@click.option(
    "--format",
    "target_format",
    type=click.Choice(["hf", "compressed-tensors", "gguf"]),
    default="hf",
    show_default=True,
    help="What to write: Hugging Face's layout; a quantized source's values, as vLLM and transformers take them; or a "
    "file for llama.cpp.",
)
@click.option(
    "--int8-layout",
    type=click.Choice(["packed", "activations"]),
    help="Of compressed-tensors: for kernels that leave activations as they are, or that make them int8.  "
    "[default: packed]",
)
@click.option(
    "--gguf-type",
    type=click.Choice(["Q8_0", "Q4_0", "F16"]),
    help="Of gguf: what its linears are in; F16 is for all matrices.  [default: by what the source holds]",
)
@click.option("--keep-int8", is_flag=True, help="Keep int8 weights as int8, in a layout that transformers takes.")
@click.option("--layers", type=click.IntRange(min=1), help="Keep only the first N layers.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest size of a model file.")
@click.option(
    "--check-logits", is_flag=True, help="Run a prompt through source and result afterwards (with transformers)."
)
@click.option(
    "--verify", is_flag=True, help="Check the files' digests afterwards; without --config/--source, just check --out."
)
@click.option("--force", is_flag=True, help="Replace what this tool wrote to --out before.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.version_option(package_name=DISTRIBUTION)
def command(
    config_name: str | None,
    source: Path | None,
    out: Path,
    storage: str,
    seed: int,
    dtype: str | None,
    target_format: str,
    int8_layout: str | None,
    gguf_type: str | None,
    keep_int8: bool,
    layers: int | None,
    max_shard_size: str,
    check_logits: bool,
    verify: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """Write the weights of a LLaMA or OPT model as a checkpoint in Hugging Face's layout.

    \b
    llama-convert --config 175B            random weights, OPT-175B's dimensions
    llama-convert --source my-llama/       a Hugging Face directory, of OPT too
    llama-convert --source llama-2-70b/    a directory of Meta's: consolidated.00.pth ..., params.json
    llama-convert --source model.gguf      a GGUF file
    llama-convert --source out/            shards of llama-quantize, the way back
    llama-convert --source out/ --format gguf    or compressed-tensors: for other programs
    llama-convert --verify --out DIR       check an output
    """
    from converters.console.errors import InputError
    from converters.console.units import parse_bytes
    from converters.convert import Conversion, convert, describe, verify_output
    from converters.model.families.hf_config import read_config
    from converters.model.families.presets import find_config
    from converters.sources.random_init import RandomSource
    from converters.target import Target
    from converters.tokenizers.auxiliary_files import note_without_tokenizer

    if verify and config_name is None and source is None:
        click.echo(verify_output(out))
        return
    if (config_name is None) == (source is None):
        raise InputError("Give either --config (random weights) or --source (a model's weights).")
    if source is None:
        found = find_config(config_name)
        if isinstance(found, Path):
            _check_distinct(found, out)
            found = read_config(found)
        config = found.cut(layers).with_dtype(dtype or found.dtype)
        weights = RandomSource(config, seed)
    else:
        from converters.sources.opening import open_source

        _check_distinct(source, out)
        weights = open_source(source)
        config = weights.config.cut(layers).with_dtype(dtype or weights.default_dtype())
    target = Target(target_format, int8_layout, gguf_type)
    conversion = Conversion(weights, config, out, storage, parse_bytes(max_shard_size), keep_int8, target)
    if check_logits:
        from converters import logits_check as logits

        logits.check_ready(conversion)
    click.echo(describe(conversion) if dry_run else convert(conversion, force))
    if verify and not dry_run:
        click.echo(verify_output(out))
    if not isinstance(weights, RandomSource):
        note_without_tokenizer(weights.auxiliary_files(), str(source))
    if check_logits and not dry_run:
        click.echo(logits.check_logits(conversion))


def _check_distinct(source: Path, out: Path) -> None:
    from converters.console.errors import InputError

    directory = source if source.is_dir() else source.parent
    if source.exists() and directory.resolve() == out.resolve():
        raise InputError(f"--out {out} is where the source is. Give another directory; an input is never changed.")


def main() -> None:
    """The console script."""
    run(command)
