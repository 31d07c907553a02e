"""One conversion from a source to a checkpoint directory: what to write, whether it fits, and writing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from converters import checkpoint
from converters.console.errors import InputError
from converters.console.progress import progress
from converters.console.units import format_bytes, format_count, plural
from converters.contents import (
    Contents,
    block_tasks,
    compressed_contents,
    floating_contents,
    gguf_contents,
    quantized_contents,
)
from converters.exports.compressed_tensors import CompressedExport
from converters.exports.gguf import GGUFExport
from converters.gguf_output import write_gguf
from converters.model.config import ModelConfig
from converters.model.parameters import parameters
from converters.output.claim import Wanted, claim
from converters.output.preflight import check_machine, estimate, free_bytes, layers_that_fit, room_for
from converters.output.record import WRITTEN, existing_bytes
from converters.output.state import State, recorded_names
from converters.sources import random_init
from converters.sources.huggingface.files import INDEX
from converters.sources.random_init import RandomSource
from converters.sources.source import QuantizedSource, TensorSource
from converters.target import COMPRESSED_TENSORS, GGUF, HF, Target
from converters.weight_files import WeightFile

STORAGES = ("auto", "files", "seed")
_HEADROOM = 1.1  # "auto" writes files only where they leave a tenth of their size free


@dataclass(frozen=True)
class Conversion:
    """A source, how to write it and where; ``storage`` is one of STORAGES.

    Raises InputError where ``keep_int8`` is asked of a source without int8 weights, or for a ``target`` that can't hold
    the source.
    """

    source: TensorSource
    config: ModelConfig  # the source's, cut to the layers to keep and with the dtype to write
    out: Path
    storage: str
    max_shard_bytes: int
    keep_int8: bool = False
    target: Target = field(default_factory=Target)

    def __post_init__(self) -> None:
        if self.keep_int8 and self.target.format != HF:
            raise InputError(f"--keep-int8 goes with --format {HF}: {self.target.format} has layouts of its own.")
        if self.keep_int8 and not (isinstance(self.source, QuantizedSource) and self.source.format == "int8"):
            raise InputError(
                "--keep-int8 is for a --source of int8 weights: shards made with llama-quantize --int8, or a "
                "directory in the compressed-tensors layout. Leave it out, or quantize first."
            )
        if self.target.format == GGUF and self.storage == "seed":
            raise InputError(f"--storage seed goes with --format {HF}: a GGUF file holds values. Leave it out.")
        _ = self.compressed, self.gguf and self.gguf.file  # they refuse what they can't hold

    @cached_property
    def compressed(self) -> CompressedExport | None:
        """What is written for compressed-tensors; None for another target."""
        if self.target.format != COMPRESSED_TENSORS:
            return None
        return CompressedExport(self.source, self.config, self.target.int8_layout)

    @cached_property
    def gguf(self) -> GGUFExport | None:
        """What is written for llama.cpp; None for another target."""
        if self.target.format != GGUF:
            return None
        return GGUFExport(self.source, self.config, self.target.gguf_type)

    @property
    def kept_names(self) -> set[str]:
        """The names of the weights that stay quantized."""
        if self.compressed:
            return set(self.compressed.codes)
        return self.source.quantized_names(self.config) if self.keep_int8 else set()

    @cached_property
    def contents(self) -> Contents:
        if self.compressed:
            return compressed_contents(self.compressed)
        if self.gguf:
            return gguf_contents(self.gguf)
        if self.keep_int8:
            return quantized_contents(self.source, self.config)
        return floating_contents(self.source, self.config)

    @cached_property
    def files(self) -> Sequence[WeightFile]:
        if self.gguf:
            return [self.gguf.file]
        return checkpoint.plan_files(self.contents, self.max_shard_bytes)

    @cached_property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def arguments(self) -> dict[str, Any]:
        """The arguments that the result follows from."""
        return {
            "source_fingerprint": self.source.fingerprint(),
            "layers": self.config.num_layers,
            "dtype": self.config.dtype,
            "storage": self.storage,
            "max_shard_bytes": self.max_shard_bytes,
            "keep_int8": self.keep_int8,
            **self.target.arguments(),
        }

    def wanted(self, storage: str) -> Wanted:
        """The output to claim, for ``storage`` files or seed."""
        names = checkpoint.file_names(self.source, self.files if storage == "files" else [])
        if self.gguf:
            names = (self.gguf.file.name,)
        recorded = storage == "files"
        return Wanted("llama-convert", self.out, self.arguments(), tuple(self.source.files()), names, recorded)

    def missing_bytes(self) -> int:
        """Bytes that a run would still have to write. A file of the same name counts as room, whatever it holds."""
        return sum(max(0, file.nbytes - existing_bytes(self.out, [file.name])) for file in self.files)

    def choose_storage(self) -> tuple[str, str]:
        """``files`` or ``seed``, and a sentence that says why; it is empty where there was nothing to choose."""
        if self.storage != "auto":
            return self.storage, ""
        if not isinstance(self.source, RandomSource) or self.gguf:
            return "files", ""
        begun = recorded_names(self.out, self.arguments(), checkpoint.finished)
        if begun:  # an earlier run with the same arguments chose, whatever the disk holds now
            return "seed" if random_init.FILE_NAME in begun else "files", ""
        free = free_bytes(self.out)
        if self.missing_bytes() * _HEADROOM <= free:
            return "files", ""
        return "seed", (
            f"Kept the seed in place of weight files: {format_bytes(self.nbytes)} of files would not leave a tenth of "
            f"their size spare in the {format_bytes(free)} free here. The later commands make the same values from "
            "random_init.json, bit for bit. To have files all the same: --storage files, on a larger disk (--out) or "
            "for fewer layers (--layers)."
        )


def convert(conversion: Conversion, force: bool) -> str:
    """Convert, or finish an interrupted conversion. Returns the lines to show the user.

    Raises InputError where the output can't be claimed or doesn't fit, and for bad values of the source.
    """
    storage, reason = conversion.choose_storage()
    if storage == "seed" and not isinstance(conversion.source, RandomSource):
        raise InputError("--storage seed is for random weights (--config); a --source is always written as files.")

    wanted = conversion.wanted(storage)

    def check_room(existing: int) -> None:
        if storage == "files":
            _check_fits(conversion, len(wanted.names), existing)

    with claim(wanted, checkpoint.finished, check_room, force) as output:
        if output.state is State.FINISHED:
            return f"{conversion.out} is already complete, large files by their size; nothing was left to do."
        if storage == "seed":
            check = checkpoint.write_seed(conversion.source, output)
        elif conversion.gguf:
            conversion.gguf.check_scales()
            with progress("Converting", conversion.nbytes) as advance:
                check = write_gguf(conversion.contents, conversion.gguf.file, output, advance)
        else:
            with progress("Converting", conversion.nbytes) as advance:
                source, contents, files = conversion.source, conversion.contents, conversion.files
                check = checkpoint.write_files(source, contents, output, files, advance)
    return "\n".join(filter(None, [_summary(conversion, storage), check.line(), reason]))


def verify_output(out: Path) -> str:
    """Check every file of a finished checkpoint against its digest. Returns the line to show the user.

    Raises InputError where a file is missing or has changed, or where no digests are kept.
    """
    total = sum(path.stat().st_size for path in out.glob("*") if path.is_file())
    with progress("Verifying", total) as advance:
        files = checkpoint.verify(out, advance)
    nbytes = sum(file.nbytes for file in files.values())
    line = f"{out}: {plural(len(files), 'file')}, {format_bytes(nbytes)}, every digest as it was written"
    if not (out / WRITTEN).is_file() and any(name.endswith(".safetensors") for name in files):
        line += f"; the other files have no digests, since {WRITTEN} is missing"
    return line


def describe(conversion: Conversion) -> str:
    """What ``convert`` would write, for --dry-run."""
    storage, reason = conversion.choose_storage()
    lines = [_summary(conversion, storage), reason]
    if storage == "files":
        lines += [f"  {file.name}  {format_bytes(file.nbytes)}" for file in conversion.files]
        lines += [] if conversion.gguf else [f"  {INDEX}, config.json"]
        lines.append(f"  {format_bytes(free_bytes(conversion.out))} free here")
        tasks = block_tasks(conversion.contents, conversion.contents.specs)
        lines.append(estimate(conversion.out, conversion.missing_bytes(), tasks, lambda block: block.values.nbytes))
    return "\n".join(filter(None, lines))


def _check_fits(conversion: Conversion, files: int, existing: int) -> None:
    """Raise InputError, saying what would fit, where the files don't; ``existing`` bytes are there already."""
    check_machine(conversion.out, files)
    needed, free = conversion.nbytes - existing, free_bytes(conversion.out)
    if needed <= 0 or room_for(needed) <= free:
        return
    fitting = layers_that_fit(conversion.config, lambda config: replace(conversion, config=config).nbytes, free)
    seed = ", or --storage seed" if isinstance(conversion.source, RandomSource) else ""
    raise InputError(
        f"{conversion.out} needs {format_bytes(needed)} and {format_bytes(free)} are free there. "
        f"Give --out on a larger disk{fitting}{seed}."
    )


def _summary(conversion: Conversion, storage: str) -> str:
    config = conversion.config
    count = format_count(sum(parameter.elements for parameter in parameters(config)))
    form = (
        "a seed" if storage == "seed" else f"{plural(len(conversion.files), 'file')}, {format_bytes(conversion.nbytes)}"
    )
    layers = plural(config.num_layers, "layer")
    quantized = conversion.source.format if conversion.keep_int8 else None
    if conversion.compressed:
        quantized = conversion.compressed.title
    dtype = f"{quantized} and {config.dtype}" if quantized else config.dtype
    if conversion.gguf:
        dtype = f"GGUF, {conversion.gguf.title}"
    return f"{conversion.out}: {config.name}, {layers}, {count} parameters, {dtype}, {form}"
