"""One run of llama-quantize: what to make from which source, whether it fits, and making it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from converters.checkpoint import finished as written
from converters.console.errors import InputError
from converters.console.progress import progress
from converters.console.units import format_bytes, plural
from converters.model.config import ModelConfig
from converters.output.claim import Wanted, claim
from converters.output.preflight import check_machine, estimate, free_bytes, layers_that_fit, room_for
from converters.output.state import State
from converters.sources.opening import open_source
from converters.sources.source import TensorSource
from converters.tokenizers.auxiliary_files import note_without_tokenizer
from quantize.calibrated import calibrated, read_calibration
from quantize.calibration.calibrator import Calibration, Fit, FitTarget, find_calibrator
from quantize.calibration.gathered import find_moments
from quantize.fitted import fit_formats, fit_lines, measured_line
from quantize.format_options import AskedFormat
from quantize.formats.table import CALIBRATED, RTN, SCALE, methods_for
from quantize.kept import keeping
from quantize.pipeline import Sharding, finished, piece_tasks, write_shards
from quantize.shards.manifest import FILE_NAME, Manifest, chip_file
from quantize.shards.partition import plan_heads
from quantize.shards.reading import Shards
from quantize.shards.scheme import Scheme, mixture
from quantize.shards.stored import padding_bytes
from quantize.values import BlockSource, Quantizer, Resharder


@dataclass(frozen=True)
class QuantizeRequest:
    """What the command line asked for, or a caller from Python, who may give every weight a format of its own."""

    checkpoint: Path
    out: Path
    format: AskedFormat | Mapping[str, str]  # by the weights' names as ``mixture`` takes them, for the whole model
    chips: int
    only_chips: tuple[int, ...] = ()
    layers: int | None = None
    quantize_lm_head: bool = False
    method: str = SCALE
    calibrate: tuple[Path, ...] = ()  # files of tokens for the model's linears to be looked at over
    calibration_tokens: int = 8192
    moments: Path | None = None  # the directory for what was seen; None: one beside ``out``
    fit: FitTarget | None = None  # what formats are chosen to fit, in place of ``format``
    keep: bool = False  # what another tool has quantized as it is; ``format`` is for the rest

    @property
    def moments_directory(self) -> Path:
        return self.moments or self.out.parent / f"{self.checkpoint.resolve().name}-moments"


def quantize(request: QuantizeRequest, force: bool, dry_run: bool) -> str:
    """Make the shards, or finish those of an interrupted run. Returns the lines to show the user."""
    _check_calibration(request)
    sharding, source, fitted, text, weights = _plan(request)
    lines = _describe(sharding, request.out) + (fit_lines(fitted, request.fit) if fitted else [])
    if dry_run:
        if request.calibrate:
            lines.append("  The time below is without calibration.")
        lines.append(f"  {format_bytes(free_bytes(request.out))} free here")
        tasks, files = piece_tasks(sharding, source, sharding.only_chips), len(sharding.only_chips)
        lines.append(estimate(request.out, sharding.nbytes, tasks, lambda piece: piece.nbytes, files))
        return "\n".join(lines)
    wanted = sharding.wanted(request.out, source)

    def check_room(existing: int) -> None:
        _check_fits(sharding, wanted, existing)

    with claim(wanted, finished, check_room, force) as output:
        if output.state is State.FINISHED:
            return f"{request.out} is already complete, large files by their size; nothing was left to do."
        source.begin(sharding.config, sharding.scheme, output.directory)
        with progress("Quantizing" if isinstance(source, Quantizer) else "Sharding", sharding.nbytes) as advance:
            write_shards(sharding, source, output, advance)
        source.close()
    # Of what it wrote itself, llama-convert has said it.
    if isinstance(source, Quantizer) and not _is_converted(request.checkpoint):
        note_without_tokenizer(source.small_files(), str(request.checkpoint))
    if isinstance(source, Quantizer) and (errors := source.report.summary(sharding.scheme.title(sharding.config))):
        lines.append(errors)
    if fitted and len(sharding.only_chips) == sharding.chips:
        lines.append(measured_line(weights, request.out, sharding.config, text))
    return "\n".join(lines)


def _is_converted(checkpoint: Path) -> bool:
    """Whether llama-convert wrote it, as far as its files tell."""
    try:
        return written(checkpoint) is not None
    except InputError:
        return False


def verify_output(out: Path) -> str:
    """Check every file of a finished output against its digest. Returns the line to show the user."""
    shards = Shards(out)
    total = sum(record.nbytes for record in shards.manifest.files.values())
    with progress("Verifying", total) as advance:
        shards.verify(advance)
    return f"{out}: {plural(len(shards.manifest.files), 'file')}, {format_bytes(total)}, every digest as in {FILE_NAME}"


class Job(NamedTuple):
    """What is to be made, and where its values come from; how formats were chosen and the text, where that is so."""

    sharding: Sharding
    source: BlockSource
    fitted: Fit | None = None
    text: Calibration | None = None
    weights: TensorSource | None = None  # those that are quantized, as they are


def _plan(request: QuantizeRequest) -> Job:
    _check_distinct(request.checkpoint, request.out)
    return _reshard(request) if (request.checkpoint / FILE_NAME).exists() else _quantize(request)


def _reshard(request: QuantizeRequest) -> Job:
    shards = Shards(request.checkpoint)
    _check_scheme(request, shards)
    shards.require(range(shards.chips))
    return Job(_sharding(request, shards.config, shards.manifest), Resharder(shards))


def _quantize(request: QuantizeRequest) -> Job:
    weights = open_source(request.checkpoint)
    config, fitted, calibration = weights.config, None, None
    source, text = Quantizer(weights, search=request.method != RTN), None
    scheme = None if request.fit else _asked_scheme(request, weights)
    if request.calibrate:
        if scheme and not any(each.quantizes for each in scheme.formats):
            raise InputError("Nothing is to be quantized, so nothing to calibrate: leave out --calibrate.")
        if request.fit:
            find_calibrator().check_fit(config.cut(request.layers), request.fit, request.format.zero_points)
        text = read_calibration(weights, request.checkpoint, request.calibrate, request.calibration_tokens)
        calibration, moments, directory = text.as_json(), None, request.moments_directory
        if request.fit:
            cut = config.cut(request.layers)
            moments = find_moments(directory, weights, cut, text)
            fitted = fit_formats(directory, weights, cut, text, request.fit, request.format.zero_points, moments)
            scheme = fitted.scheme
        source = calibrated(weights, request.method, text, directory, moments)
    made = Made(scheme, weights.fingerprint(), request.method, calibration)
    sharding = _sharding(request, config, made)
    source.note_kept(sharding.config, sharding.scheme)
    return Job(sharding, source, fitted, text, weights)


class Made(NamedTuple):
    """How values are made, as a manifest has it too."""

    scheme: Scheme
    source_fingerprint: str
    method: str | None
    calibration: dict[str, Any] | None


def _sharding(request: QuantizeRequest, config: ModelConfig, made: Made | Manifest) -> Sharding:
    """What is to be written. Raises InputError where the scheme doesn't fit the model."""
    config = config.cut(request.layers)
    scheme = made.scheme.cut(config)
    config = config.with_dtype(scheme.floating_dtype(config))
    scheme.check(config)
    method = made.method if made.method in methods_for(scheme.formats) else None
    return Sharding(
        config, scheme, request.chips, _only_chips(request), made.source_fingerprint, method, made.calibration
    )


def _check_calibration(request: QuantizeRequest) -> None:
    """Raise InputError for a method and a text that don't go together."""
    if request.fit and not request.calibrate:
        raise InputError("--fit weighs formats by what a text tells of them: add --calibrate TEXT.")
    shards = (request.checkpoint / FILE_NAME).exists()
    if request.keep and (request.calibrate or request.fit or shards):
        other = f"{request.checkpoint} holds shards" if shards else "a text changes nothing about them"
        raise InputError(
            f"--keep is for weights as another tool has quantized them, and {other}: leave out one of both."
        )
    if not request.calibrate:
        if request.method in CALIBRATED and not shards:
            raise InputError(f"--method {request.method} looks at the inputs of linears: add --calibrate TEXT.")
        if request.moments is not None:
            raise InputError("--moments is where calibration keeps what it saw: add --calibrate TEXT, or leave it out.")
        return
    if request.method == RTN:
        raise InputError("--method rtn takes the largest magnitude, whatever the inputs: leave out one of the two.")
    if shards:
        raise InputError(f"{request.checkpoint} holds shards, whose values are chosen: leave out --calibrate.")


def _asked_scheme(request: QuantizeRequest, source: TensorSource) -> Scheme:
    config = source.config
    if request.keep:
        rest = request.format.scheme(config, request.quantize_lm_head) if request.format.kind else None
        return keeping(source, config.cut(request.layers), request.checkpoint, rest)
    if isinstance(request.format, AskedFormat):
        return request.format.scheme(config, request.quantize_lm_head)
    return mixture(config, request.format)


def _check_scheme(request: QuantizeRequest, shards: Shards) -> None:
    """Raise InputError where re-sharding was asked for with other formats than the shards were made with."""
    scheme, method = shards.manifest.scheme, shards.manifest.method
    same_method = method is None or request.method in (SCALE, method)
    if same_method and _is_as_asked(scheme, request, shards.config):
        return
    flags = scheme.flags + (f" --method {method}" if method not in (None, SCALE) else "")
    made = "of several formats" if scheme.overrides else f"made with {flags}"
    how = "without options for one" if scheme.overrides else "with the same"
    raise InputError(f"{shards.directory} holds shards {made}; they can only be re-sharded {how}.")


def _is_as_asked(scheme: Scheme, request: QuantizeRequest, config: ModelConfig) -> bool:
    asked = request.format
    if not isinstance(asked, AskedFormat):
        return mixture(config, asked) == scheme
    any_head = asked.kind is None and not request.quantize_lm_head
    return asked.agrees(scheme) and (any_head or request.quantize_lm_head == scheme.quantize_lm_head)


def _only_chips(request: QuantizeRequest) -> tuple[int, ...]:
    if not request.only_chips:
        return tuple(range(request.chips))
    beyond = [chip for chip in request.only_chips if chip >= request.chips]
    if beyond:
        raise InputError(f"--only-chip {beyond[0]}: {request.chips} chips are numbered 0 to {request.chips - 1}.")
    return tuple(sorted(set(request.only_chips)))


def _check_distinct(checkpoint: Path, out: Path) -> None:
    if checkpoint.resolve() == out.resolve():
        raise InputError(f"--out {out} is the input. Give another directory; an input is never changed.")


def _check_fits(sharding: Sharding, wanted: Wanted, existing: int) -> None:
    """Raise InputError, saying what would fit, where the files don't; ``existing`` bytes are on the disk already."""
    check_machine(wanted.out, len(wanted.names), at_once=len(sharding.only_chips))
    needed, free = sharding.nbytes - existing, free_bytes(wanted.out)
    if needed <= 0 or room_for(needed) <= free:
        return
    layers = layers_that_fit(sharding.config, lambda config: replace(sharding, config=config).nbytes, free)
    files = free // room_for(sharding.file_bytes)
    chips = f", --only-chip for {files} of the files" if 0 < files < len(sharding.only_chips) else ""
    raise InputError(
        f"{wanted.out} needs {format_bytes(needed)} and {format_bytes(free)} are free there. Give --out on a larger "
        f"disk{chips}{layers}."
    )


def _describe(sharding: Sharding, out: Path) -> list[str]:
    """What the output holds, and what the number of chips costs in padding."""
    config = sharding.config
    count = len(sharding.only_chips)
    first, last = (chip_file(chip, sharding.chips) for chip in (sharding.only_chips[0], sharding.only_chips[-1]))
    files = first if count == 1 else f"{first} ... {last}"
    lines = [
        f"{out}: {config.name}, {plural(config.num_layers, 'layer')}, {sharding.scheme.title(config)}, "
        f"{count} of {sharding.chips} chips' files, {format_bytes(sharding.file_bytes)} each, "
        f"{format_bytes(sharding.nbytes)} in all ({files})"
    ]
    plan = plan_heads(config.num_heads, config.num_kv_heads, sharding.chips)
    if plan.query_places != config.num_heads or plan.kv_places != config.num_kv_heads:
        lines.append(
            f"{config.num_heads} query and {config.num_kv_heads} KV heads take {plan.query_places} and "
            f"{plan.kv_places} places on {sharding.chips} chips (heads of zeros, repeated KV heads)."
        )
    extra = padding_bytes(config, sharding.scheme, sharding.chips)
    if extra:
        share = extra / (sharding.file_bytes * sharding.chips - extra)
        lines.append(f"Padding adds {format_bytes(extra)} ({share:.1%}) over all chips.")
    return lines
