"""llama-quantize: a checkpoint into int8, int4, fp8 or bfloat16 shards, one safetensors file per TPU chip."""

from __future__ import annotations

from pathlib import Path

import click

from converters.console.command import DISTRIBUTION, run
from quantize.format_options import KIND_FLAGS, AskedFormat, format_options
from quantize.formats.table import METHODS, SCALE


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("checkpoint", type=click.Path(path_type=Path), default="checkpoint")
@format_options
@click.option(
    "--keep",
    is_flag=True,
    help="Keep values and scales that another tool has quantized, where a format holds them; a format is for the rest.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Look at the linears' inputs over this text (.txt, or token ids: .json, .npy); may be repeated.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="How many tokens of it, the first ones.",
)
@click.option(
    "--moments",
    type=click.Path(path_type=Path),
    help="A directory that keeps what was seen, for all formats. [default: beside --out, CHECKPOINT's name + -moments]",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=SCALE,
    show_default=True,
    help="scale: scales of least squared error, of the outputs with --calibrate; rtn: by the largest magnitude; with "
    "--calibrate also gptq: rounding with error feedback, awq: inputs scaled by their importance.",
)
@click.option(
    "--fit",
    metavar="SLICE|BYTES",
    help="Choose every linear's format such that weights, cache and the compiler's temporaries fit a slice (v4-8), or "
    "weights a size per chip (14GB, with --chips), and --calibrate's text is predicted best.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="With --fit: rows of the cache."
)
@click.option(
    "--max-seq-len", type=click.IntRange(min=1), default=256, show_default=True, help="With --fit: slots of the cache."
)
@click.option(
    "--chips",
    type=click.IntRange(min=1, max=4096),
    help="Files to make, one per chip (tpu7x: two per chip). [default: 1, or the target's]",
)
@click.option(
    "--target",
    metavar="SLICE",
    help="A TPU slice in place of --chips: v4-16 has 8 chips, tpu7x-8 has 8 devices on 4 chips.",
)
@click.option(
    "--only-chip",
    "only_chips",
    type=click.IntRange(min=0),
    multiple=True,
    help="Write only this chip's file; may be repeated.",
)
@click.option("--out", type=click.Path(path_type=Path), default="out", show_default=True, help="Where to write.")
@click.option("--layers", type=click.IntRange(min=1), help="Keep only the first N layers.")
@click.option("--quantize-lm-head", is_flag=True, help="Quantize the output head as well.")
@click.option("--force", is_flag=True, help="Replace what this tool wrote to --out before.")
@click.option("--verify", is_flag=True, help="Check the files' digests afterwards; without a format, just check --out.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.version_option(package_name=DISTRIBUTION)
def command(
    checkpoint: Path,
    kind: str | None,
    group_size: str | None,
    zero_points: bool,
    keep: bool,
    calibrate: tuple[Path, ...],
    calibration_tokens: int,
    moments: Path | None,
    method: str,
    fit: str | None,
    batch_size: int,
    max_seq_len: int,
    chips: int | None,
    target: str | None,
    only_chips: tuple[int, ...],
    out: Path,
    layers: int | None,
    quantize_lm_head: bool,
    force: bool,
    verify: bool,
    dry_run: bool,
) -> None:
    """Quantize CHECKPOINT (default: checkpoint/) and split it into one file per chip.

    CHECKPOINT may also be a directory of shards: then it is re-sharded for another number of chips, in the formats that
    it has, with or without the options it was made with.

    \b
    llama-quantize --int8                        one chip
    llama-quantize --int8 --target v4-16         8 chips
    llama-quantize --int4                        4 bits, a scale for every 128 inputs
    llama-quantize llama-awq/ --keep             what AWQ has quantized, as it is
    llama-quantize out8/ --chips 4 --out out4/   shards for 4 chips, made of others
    llama-quantize --verify --out out/           check an output
    """
    from converters.console.errors import InputError
    from quantize.calibration.target import fit_target
    from quantize.job import QuantizeRequest, quantize, verify_output
    from quantize.shards.manifest import FILE_NAME

    if kind is None and (group_size or (zero_points and fit is None)):
        raise InputError(f"--group-size and --zero-points are for a format: give {KIND_FLAGS} with them.")
    if fit is not None and (kind or group_size or target):
        raise InputError("--fit chooses formats itself, for its own slice: leave out the others' options and --target.")
    reshards = kind is None and fit is None and not verify and (checkpoint / FILE_NAME).is_file()
    if kind is None and fit is None and not (reshards or verify or keep):
        raise InputError(
            f"Give {KIND_FLAGS}, or --keep (or --verify alone, to check --out; shards are split anew without)."
        )
    if kind is not None or fit is not None or reshards or keep:
        aim = None if fit is None else fit_target(fit, chips, batch_size, max_seq_len)
        request = QuantizeRequest(
            checkpoint,
            out,
            AskedFormat(kind, group_size, zero_points),
            aim.chips if aim else _chip_count(chips, target),
            only_chips,
            layers,
            quantize_lm_head,
            method,
            calibrate=calibrate,
            calibration_tokens=calibration_tokens,
            moments=moments,
            fit=aim,
            keep=keep,
        )
        click.echo(quantize(request, force, dry_run))
    if verify and not dry_run:
        click.echo(verify_output(out))


def _chip_count(chips: int | None, target: str | None) -> int:
    from converters.console.errors import InputError
    from converters.console.notes import note
    from quantize.slices import find_slice

    if target is None:
        return chips or 1
    slice_ = find_slice(target)
    if chips not in (None, slice_.devices):
        has = slice_.devices if slice_.devices_per_chip == 1 else slice_.size
        raise InputError(f"--chips {chips} contradicts --target {target}, which has {has}. Give one of them.")
    if slice_.devices_per_chip > 1:
        note(f"{slice_.name} is {slice_.size}: every device gets a file of its own and is counted as a chip here.")
    return slice_.devices


def main() -> None:
    """The console script."""
    run(command)
