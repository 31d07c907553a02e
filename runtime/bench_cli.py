"""llama-bench: the post's figures, measured on this machine's device."""

from __future__ import annotations

from pathlib import Path

import click

from converters.console.command import DISTRIBUTION, run
from converters.console.units import parse_integers
from runtime.bench.points import FIGURES, MAX_SEQ_LENS, PROMPT_LENS, fitting_sizes

_BATCH_SIZES = (1, 2, 4, 8)


def _parse_sizes(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        sizes = parse_integers(text)
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise click.BadParameter(f"{text!r}: give different positive numbers like 1,2,4,8.")
    return sizes


def _parse_figures(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in FIGURES:
            raise click.BadParameter(f"{name!r} is no figure; valid: {','.join(FIGURES)}.")
    return tuple(dict.fromkeys(names))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--shards",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    metavar="DIR",
    help="What llama-quantize wrote. Given again, with shards of the same model in other formats, figure 5 compares "
    "them all; the other figures measure the first.",
)
@click.option(
    "--bf16-shards",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The same model's shards made with --bf16, for figure 5. [default: those of --shards, or its first "
    "dequantized, in --out]",
)
@click.option(
    "--figures",
    default=",".join(FIGURES),
    show_default=True,
    callback=_parse_figures,
    help="2: backends. 3: batch size. 4: max-seq-len. 5: formats of the weights. 6: prompt length. "
    "baseline: transformers. Measured in the order given.",
)
@click.option(
    "--batch-size",
    "batch_sizes",
    default=",".join(map(str, _BATCH_SIZES)),
    show_default=True,
    callback=_parse_sizes,
    help="Sizes of figure 3; figure 5 takes the smallest and the largest, the others the first.",
)
@click.option(
    "--prompt-len",
    "prompt_lens",
    callback=_parse_sizes,
    help=f"Lengths of figure 6; the others take the first. [default: {','.join(map(str, PROMPT_LENS))}, those that "
    "fit]",
)
@click.option(
    "--max-seq-len",
    "max_seq_lens",
    callback=_parse_sizes,
    help="Lengths of figure 4; figure 6 takes the largest, the others the first. "
    f"[default: {','.join(map(str, MAX_SEQ_LENS))}, those that fit the model and the first prompt]",
)
@click.option(
    "--max-new-tokens",
    "new_tokens",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Tokens that a run decodes; a device with fast steps wants more (the post: 256).",
)
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each point.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=15,
    show_default=True,
    help="Begin no run that would not be over by then, as far as earlier runs of its backend tell; the same command "
    "again does what is left.",
)
@click.option("--layers", type=click.IntRange(min=1), help="Measure only the first N layers.")
@click.option("--out", type=click.Path(path_type=Path), default="bench", show_default=True, help="Where to write.")
@click.option("--force", is_flag=True, help="Measure again what --out holds of an earlier bench.")
@click.option("--json", "as_json", is_flag=True, help="Print bench.json in place of the tables.")
@click.version_option(package_name=DISTRIBUTION)
def command(
    shards: tuple[Path, ...],
    bf16_shards: Path | None,
    figures: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    prompt_lens: tuple[int, ...] | None,
    max_seq_lens: tuple[int, ...] | None,
    new_tokens: int,
    repeat: int,
    minutes: float,
    layers: int | None,
    out: Path,
    force: bool,
    as_json: bool,
) -> int:
    """Measure the model in SHARDS as the post's figures do: llama-run over sizes and backends, and transformers.

    \b
    llama-bench --shards out/                                  every figure, into bench/
    llama-bench --shards out/ --figures 3,5 --batch-size 1,16  two of them
    llama-bench --shards int8/ --shards int4/ --figures 5      two formats and bfloat16
    """
    from converters.console.units import plural
    from quantize.shards.reading import Shards
    from runtime.bench.bench import BenchRequest, bench
    from runtime.bench.report import to_markdown
    from runtime.json_out import STDOUT, write_json_out

    positions = Shards(shards[0]).config.max_position_embeddings
    sizes = fitting_sizes(batch_sizes, prompt_lens, max_seq_lens, new_tokens, positions)
    done = bench(BenchRequest(shards, bf16_shards, figures, sizes, repeat, minutes, layers, out, force))
    if as_json:
        write_json_out(STDOUT, done.report)
    else:
        click.echo(to_markdown(done.report).rstrip("\n"))
    if done.left:
        click.echo(f"The time is up with {plural(done.left, 'run')} left. The same command goes on there.", err=True)
    if done.failed:
        where = f"{out / 'bench.md'} says why, and the same command tries again"
        click.echo(f"Error: {plural(done.failed, 'row')} failed; {where}.", err=True)
        return 1
    return 0


def main() -> None:
    """The console script."""
    run(command)
