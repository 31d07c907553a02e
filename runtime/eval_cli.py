"""llama-eval: perplexity of quantized weights over text, and how far they are from the weights they were made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from converters.console.command import DISTRIBUTION, run
from runtime.model.sizing import ACTIVATIONS, CACHE_DTYPES

if TYPE_CHECKING:
    from runtime.evaluate.report import Evaluation

# What is said to who gives no text.
_WANTED = (
    "Give --text: text that the model was not calibrated on, of the kind that it will be used for, of 8,192 tokens or "
    "more (.txt, or token ids as .json or .npy). There is no built-in text."
)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--shards", type=click.Path(path_type=Path), required=True, metavar="DIR", help="What llama-quantize wrote."
)
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Text to predict: .txt, cut by the shards' tokenizer, or token ids, as .json (a list) or .npy (one row). May "
    "be repeated: the files follow each other.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Shards, a checkpoint, or any source that llama-convert reads: the model to compare with.",
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=8192, show_default=True, help="Take as many of the text, its first."
)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens that are predicted from each other alone: the text is cut into windows of so many.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="float32",
    show_default=True,
    help="Of activations, and of the cache, in both models. float32 shows what the weights alone cost.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", *CACHE_DTYPES]),
    default="auto",
    show_default=True,
    help="Of the cache alone, in the model of --shards.",
)
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="auto",
    show_default=True,
    help="int8 rounds every token's activations, in the model of --shards.",
)
@click.option(
    "--backend",
    type=click.Choice(["xla", "inductor", "eager"]),
    default="xla",
    show_default=True,
    help="XLA over all chips, or PyTorch on this host's CPU or CUDA device.",
)
@click.option(
    "--compile-cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep compiled graphs here, for the next start to load. Give none that others write to: they are run.",
)
@click.option("--layers", type=click.IntRange(min=1), help="Run only the first N layers of both models.")
@click.option("--by-layer", is_flag=True, help="Also compare both models cut after one layer, after two and so on.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the divergence over the window's places."
)
@click.option(
    "--json", "json_out", metavar="FILE|-", help="Write the figures as JSON; - for stdout, in place of the table."
)
@click.version_option(package_name=DISTRIBUTION)
def command(
    shards: Path,
    texts: tuple[Path, ...],
    against: Path | None,
    tokens: int,
    window: int,
    dtype: str,
    kv_cache_dtype: str,
    activations: str,
    backend: str,
    compile_cache: Path | None,
    layers: int | None,
    by_layer: bool,
    plot: Path | None,
    json_out: str | None,
) -> int:
    """Predict TEXT with the model in SHARDS: its perplexity and, with --against, its divergence from another model.

    \b
    llama-eval --shards out/ --text held-out.txt
    llama-eval --shards out/ --text held-out.txt --against checkpoint/
    """
    from converters.console.errors import InputError
    from converters.console.units import plural
    from quantize.shards.reading import Shards
    from runtime.devices.compile_cache import check_folder
    from runtime.json_out import STDOUT, check_json_out, write_file_out, write_json_out
    from runtime.run.token_files import TokenFiles

    if compile_cache is not None and backend == "eager":
        raise InputError("--backend eager compiles nothing; leave out --compile-cache.")
    if compile_cache is not None:
        check_folder(compile_cache, needs_writing=backend != "xla")
    draw = _drawing(plot, against)
    files = TokenFiles(texts, "--text", "--tokens", _WANTED)
    files.check()
    check_json_out(json_out)
    Shards(shards)  # report a bad directory before torch is loaded
    import torch

    from runtime.evaluate.evaluate import evaluate_model
    from runtime.run.session import SessionOptions
    from runtime.run.stored_model import open_model

    options = SessionOptions(
        backend=backend,
        dtype=getattr(torch, dtype),
        kv_cache_dtype=None if kv_cache_dtype == "auto" else getattr(torch, kv_cache_dtype),
        activations=activations,
        max_seq_len=window,
        layers=layers,
        compile_cache=compile_cache,
    )
    model = open_model(shards, 1, layers)
    done = evaluate_model(
        model, files.read(tokens, model.codec, model.config.vocab_size, model.path), options, against, by_layer
    )
    if done is None:
        return 0
    if json_out != STDOUT:
        click.echo(done.table())
    if json_out is not None:
        write_json_out(json_out, done.to_json())
    if plot is not None and draw is not None:
        write_file_out("--plot", plot, draw(done))
    if done.recompilations:
        count = plural(done.recompilations, "graph")
        click.echo(f"Error: {count} compiled after warm-up, where none should be: don't trust this run.", err=True)
        return 1
    return 0


def _drawing(plot: Path | None, against: Path | None) -> Callable[[Evaluation], bytes] | None:
    """What draws the picture, found before the run: there is no matplotlib everywhere."""
    from converters.console.errors import InputError
    from runtime.json_out import check_file_out

    if plot is None:
        return None
    if against is None:
        raise InputError("--plot draws the divergence from another model: give --against, or leave it out.")
    if plot.suffix != ".png":
        raise InputError(f"--plot {plot} would be a PNG; give a name that ends in .png.")
    check_file_out("--plot", plot)
    from runtime.evaluate.plot import draw

    return draw


def main() -> None:
    """The console script."""
    from runtime.devices.processes import leave

    try:
        run(command)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)
        raise
