"""One conversion from a source to a checkpoint directory: what is to be written, whether it fits, and the writing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters import checkpoint
from converters.config import ModelConfig
from converters.errors import InputError
from converters.hf import INDEX
from converters.layout import parameters
from converters.output import State, claim
from converters.progress import progress
from converters.random_init import RandomSource
from converters.source import TensorSource
from converters.units import format_bytes, format_count, plural

STORAGES = ("auto", "files", "seed")
_HEADROOM = 1.1  # files are written by themselves only where they leave a tenth of their size free


@dataclass(frozen=True)
class Conversion:
    """A source, the form to write it in and where; ``storage`` is one of STORAGES."""

    source: TensorSource
    config: ModelConfig  # the source's, with the layers kept and the dtype to write
    out: Path
    storage: str
    max_shard_bytes: int

    @property
    def files(self) -> list[checkpoint.ModelFile]:
        return checkpoint.plan_files(self.config, self.max_shard_bytes)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def arguments(self) -> dict[str, Any]:
        """What the result is a function of."""
        return {
            "source_fingerprint": self.source.fingerprint(),
            "layers": self.config.num_layers,
            "dtype": self.config.dtype,
            "storage": self.storage,
            "max_shard_bytes": self.max_shard_bytes,
        }

    def missing_bytes(self) -> int:
        """Bytes that a run would still have to write; a file of the same name gives its room, whatever it holds."""
        return sum(max(0, file.nbytes - _size(self.out / file.name)) for file in self.files)

    def choose_storage(self) -> tuple[str, str]:
        """``files`` or ``seed``, and a sentence that says why; an empty one where the user chose."""
        if self.storage != "auto":
            return self.storage, ""
        if not isinstance(self.source, RandomSource):
            return "files", ""
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
    """Do the conversion, or what an interrupted one left of it. Returns the lines to show the user."""
    storage, reason = conversion.choose_storage()
    if storage == "seed" and not isinstance(conversion.source, RandomSource):
        raise InputError("--storage seed is for random weights (--config); a --source is always written as files.")
    if storage == "files":
        _check_room(conversion)
    arguments = conversion.arguments()
    companions = checkpoint.COMPANION_NAMES
    with claim(conversion.out, arguments, checkpoint.finished, companions, force) as state:
        if state is State.FINISHED:
            return f"{conversion.out} is already complete; nothing was left to do."
        if storage == "seed":
            checkpoint.write_seed(conversion.source, conversion.out, arguments)
        else:
            with progress("Converting", conversion.nbytes) as advance:
                checkpoint.write_files(
                    conversion.source, conversion.config, conversion.out, conversion.files, arguments, advance
                )
    return "\n".join(filter(None, [_summary(conversion, storage), reason]))


def describe(conversion: Conversion) -> str:
    """What ``convert`` would write, for --dry-run."""
    storage, reason = conversion.choose_storage()
    lines = [_summary(conversion, storage), reason]
    if storage == "files":
        lines += [f"  {file.name}  {format_bytes(file.nbytes)}" for file in conversion.files]
        lines += [f"  {INDEX}, config.json", f"  {format_bytes(free_bytes(conversion.out))} free here"]
    return "\n".join(filter(None, lines))


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where ``path`` is or will be."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_room(conversion: Conversion) -> None:
    needed, free = conversion.missing_bytes(), free_bytes(conversion.out)
    if needed > free:
        raise InputError(
            f"{conversion.out} needs {format_bytes(needed)} and {format_bytes(free)} are free there. Give --out on a "
            "larger disk, --layers for fewer layers, or (random weights) --storage seed."
        )


def _summary(conversion: Conversion, storage: str) -> str:
    config = conversion.config
    count = format_count(sum(parameter.elements for parameter in parameters(config)))
    form = (
        "a seed" if storage == "seed" else f"{plural(len(conversion.files), 'file')}, {format_bytes(conversion.nbytes)}"
    )
    layers = plural(config.num_layers, "layer")
    return f"{conversion.out}: {config.name}, {layers}, {count} parameters, {config.dtype}, {form}"
