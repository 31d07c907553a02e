"""llama-run: load shards onto their chips, continue a prompt, and report the figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from converters.console.command import DISTRIBUTION, run
from converters.console.errors import shown
from converters.console.standard_streams import keep_stdout_from_libraries
from converters.console.units import parse_integers
from runtime.model.sizing import ACTIVATIONS, CACHE_DTYPES
from runtime.run.buckets import DEFAULT_BUCKETS

if TYPE_CHECKING:
    from runtime.devices.cluster import Cluster


def _parse_ids(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return parse_integers(text)
    except ValueError:
        raise click.BadParameter(f"{shown(text)} is no list of token ids; write it like 1,2,3.") from None


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--shards", type=click.Path(path_type=Path), required=True, metavar="DIR", help="What llama-quantize wrote."
)
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue; may be repeated, one row each."
)
@click.option("--prompt-ids", callback=_parse_ids, metavar="1,2,3", help="Token ids to continue.")
@click.option(
    "--prompt-len",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Ids to draw where there is no prompt.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to generate."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Rows decoded at once.")
@click.option(
    "--max-seq-len", type=click.IntRange(min=1), default=256, show_default=True, help="Length of the KV cache."
)
@click.option(
    "--buckets",
    default=",".join(map(str, DEFAULT_BUCKETS)),
    show_default=True,
    help="Prompt lengths to compile for.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0,
    show_default=True,
    help="0 takes the most probable token; above, tokens are drawn.",
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="Draw among the K most probable; 0: all."
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, min_open=True, max=1),
    default=1,
    show_default=True,
    help="Draw among the fewest tokens that have this share of the probability.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    show_default=True,
    help="Of drawn tokens, and of a drawn prompt.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of activations, and of the cache.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", *CACHE_DTYPES]),
    default="auto",
    show_default=True,
    help="Of the cache alone; int8 has a scale per token and head, and its logit error is reported.",
)
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="auto",
    show_default=True,
    help="int8 rounds every token's activations for products of integers: for int8 and int4 weights, one scale a row.",
)
@click.option(
    "--backend",
    type=click.Choice(["xla", "inductor", "eager"]),
    default="xla",
    show_default=True,
    help="XLA over all chips, or PyTorch on this host's CPU or CUDA device.",
)
@click.option("--layers", type=click.IntRange(min=1), help="Run only the first N layers.")
@click.option(
    "--compile-cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep compiled graphs here, for the next start to load. Give none that others write to: they are run.",
)
@click.option(
    "--coordinator", metavar="HOST:PORT", help="Of several processes: where process 0 is, with a free port there."
)
@click.option("--processes", type=click.IntRange(min=1), metavar="N", help="How many processes run together.")
@click.option("--process-id", type=click.IntRange(min=0), metavar="I", help="Which of them this one is, from 0.")
@click.option(
    "--json", "json_out", metavar="FILE|-", help="Write the figures as JSON; - for stdout, in place of the table."
)
@click.version_option(package_name=DISTRIBUTION)
def command(
    shards: Path,
    prompts: tuple[str, ...],
    prompt_ids: tuple[int, ...] | None,
    prompt_len: int,
    max_new_tokens: int,
    batch_size: int,
    max_seq_len: int,
    buckets: str,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    dtype: str,
    kv_cache_dtype: str,
    activations: str,
    backend: str,
    layers: int | None,
    compile_cache: Path | None,
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    json_out: str | None,
) -> int:
    """Continue a prompt with the model in SHARDS, and report latency, throughput and memory.

    \b
    llama-run --shards out/ --prompt "Once upon a time"
    llama-run --shards out/ --batch-size 8 --json -        a prompt drawn by --seed
    """
    from converters.console.errors import InputError
    from converters.console.units import plural
    from quantize.shards.reading import Shards
    from runtime.devices.compile_cache import check_folder
    from runtime.json_out import check_json_out, write_json_out
    from runtime.run.buckets import parse_buckets

    if prompts and prompt_ids is not None:
        raise InputError("Give --prompt or --prompt-ids, not both.")
    if not math.isfinite(temperature) or not math.isfinite(top_p):
        raise InputError("--temperature and --top-p have to be numbers; nan and inf are none.")
    if temperature == 0 and (top_k, top_p) != (0, 1):
        raise InputError("--top-k and --top-p choose among drawn tokens: give a --temperature above 0 with them.")
    if compile_cache is not None and backend == "eager":
        raise InputError("--backend eager compiles nothing; leave out --compile-cache.")
    if compile_cache is not None:
        check_folder(compile_cache, needs_writing=backend != "xla")
    cluster = _cluster(coordinator, processes, process_id, backend)
    sizes = parse_buckets(buckets)
    check_json_out(json_out)
    Shards(shards)  # report a bad directory before torch is loaded
    import torch

    from runtime.model.sampling import Sampling
    from runtime.run.prompts import PromptChoice
    from runtime.run.run import run as run_shards
    from runtime.run.session import SessionOptions

    if cluster is not None:
        keep_stdout_from_libraries()
    output = _Stdout(json_out)
    done = run_shards(
        shards,
        PromptChoice(prompts, prompt_ids, prompt_len, batch_size, seed),
        SessionOptions(
            backend=backend,
            dtype=getattr(torch, dtype),
            kv_cache_dtype=None if kv_cache_dtype == "auto" else getattr(torch, kv_cache_dtype),
            activations=activations,
            max_seq_len=max_seq_len,
            buckets=sizes,
            layers=layers,
            compile_cache=compile_cache,
            cluster=cluster,
        ),
        max_new_tokens,
        Sampling(temperature, top_k, top_p, seed),
        lambda token_ids, text: output.show(_answer(prompts, token_ids, text)),
    )
    if done is None:
        return 0
    output.show(done.table())
    if json_out is not None:
        write_json_out(json_out, done.to_json())
    output.end()
    if done.measured.interrupted:
        raise KeyboardInterrupt
    if done.recompilations:
        count = plural(done.recompilations, "graph")
        click.echo(f"Error: {count} compiled after warm-up, where none should be: don't trust these times.", err=True)
        return 1
    return 0


class _Stdout:
    """Standard output, for text. If the figures also go to a file, a failure of stdout is raised after they have."""

    def __init__(self, json_out: str | None) -> None:
        """With ``-`` nothing is shown, because stdout is for the JSON only."""
        self._is_quiet, self._keeps_failure = json_out == "-", json_out is not None
        self._failure: OSError | None = None

    def show(self, text: str) -> None:
        """Print lines immediately."""
        if self._is_quiet or self._failure:
            return
        try:
            click.echo(text)
        except OSError as error:
            if not self._keeps_failure:
                raise
            self._failure = error

    def end(self) -> None:
        """Raise the failure that was kept, if any."""
        if self._failure:
            raise self._failure


def _answer(prompts: tuple[str, ...], token_ids: list[list[int]], text: list[str] | None) -> str:
    """Every row's prompt with the generated text (or only the generated ids), each followed by an empty line."""
    if text is None:
        rows = [",".join(map(str, ids)) for ids in token_ids]
    else:
        rows = [(prompts[row % len(prompts)] if prompts else "") + part for row, part in enumerate(text)]
    return "\n".join(f"{row}\n" for row in rows)


def _cluster(coordinator: str | None, processes: int | None, process_id: int | None, backend: str) -> Cluster | None:
    """The three options together; None without them."""
    from converters.console.errors import InputError
    from runtime.devices.cluster import Cluster

    given = (coordinator, processes, process_id)
    if given == (None, None, None):
        return None
    if coordinator is None or processes is None or process_id is None:
        raise InputError("--coordinator, --processes and --process-id go together: give all three, or none.")
    if backend != "xla":
        raise InputError(f"--backend {backend} runs in one process; leave out --coordinator and what goes with it.")
    return Cluster(coordinator, processes, process_id)


def main() -> None:
    """The console script."""
    from runtime.devices.processes import leave

    try:
        run(command)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)
        raise
