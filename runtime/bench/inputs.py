"""Checking llama-bench's inputs against each other before anything is measured: shards, sizes and output folder."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from converters.console.errors import InputError
from quantize.shards.manifest import FILE_NAME as MANIFEST
from quantize.shards.reading import Shards
from runtime.bench.journal import FILE_NAME as JOURNAL
from runtime.bench.journal import is_journal
from runtime.bench.points import Sizes
from runtime.bench.report import REPORT_FILES

CACHE_FOLDER = "compile-cache"
BF16_FOLDER = "bf16-shards"


@dataclass(frozen=True)
class BenchRequest:
    """What the command line asked for."""

    shards: tuple[Path, ...]  # the first are those that all figures but 5 measure
    bf16_shards: Path | None
    figures: tuple[str, ...]
    sizes: Sizes
    repeat: int
    minutes: float
    layers: int | None
    out: Path
    force: bool


def open_shards(request: BenchRequest) -> dict[str, Shards]:
    """The shards by the names of their formats: in the order of --shards, then --bf16-shards.

    Raises InputError where some lack a chip's file, are of another model or for other chips than the first, or of a
    format that others have too, and where there are none for figure 5 to compare with bfloat16.
    """
    found: dict[str, Shards] = {}
    for directory in request.shards:
        _add(found, Shards(directory))
    if "5" in request.figures and found.keys() == {"bf16"}:
        raise InputError(
            f"Figure 5 compares quantized weights with bfloat16, and {request.shards[0]} holds bfloat16 shards. Give "
            "quantized shards as well, by another --shards, or leave figure 5 out with --figures."
        )
    if request.bf16_shards is not None:
        shards = Shards(request.bf16_shards)
        if shards.manifest.scheme.name != "bf16":
            raise InputError(
                f"--bf16-shards {request.bf16_shards} holds {_title(shards)} shards. Give some made with --bf16."
            )
        _add(found, shards)
    return found


def _add(found: dict[str, Shards], shards: Shards) -> None:
    """Add shards to those ``found`` before. Raises InputError as ``open_shards`` does."""
    shards.require(range(shards.chips))
    first = next(iter(found.values()), shards)
    if shards.config.with_dtype("bfloat16") != first.config.with_dtype("bfloat16"):
        raise InputError(
            f"{shards.directory} holds another model than {first.directory}. Give shards of the same checkpoint."
        )
    if shards.chips != first.chips:
        raise InputError(
            f"{shards.directory} is for {shards.chips} chips and {first.directory} for {first.chips}. Re-shard one "
            "of them with llama-quantize --chips."
        )
    name = shards.manifest.scheme.name
    if name in found:
        both = f"{found[name].directory} and {shards.directory}"
        raise InputError(f"{both} both hold {_title(shards)} shards. Give one of each format.")
    found[name] = shards


def _title(shards: Shards) -> str:
    return shards.manifest.scheme.title(shards.config)


def makes_bf16_shards(request: BenchRequest, shards: dict[str, Shards]) -> bool:
    """Whether figure 5 is asked for without bfloat16 shards for it."""
    return "5" in request.figures and "bf16" not in shards


def arguments(request: BenchRequest, shards: dict[str, Shards]) -> dict[str, Any]:
    """What determines the figures: sizes, shards (as ``open_shards`` has them) and the machine."""
    sizes = request.sizes
    first, *others = shards.values()
    first.config.check_context(max(sizes.max_seq_lens))
    return {
        "model": first.manifest.model,
        "shards_digest": _digest(first.directory),
        "bf16_shards_digest": None,
        **{f"{each.manifest.scheme.name}_shards_digest": _digest(each.directory) for each in others},
        "figures": list(request.figures),
        "batch_sizes": list(sizes.batch_sizes),
        "prompt_lens": list(sizes.prompt_lens),
        "max_seq_lens": list(sizes.max_seq_lens),
        "max_new_tokens": sizes.new_tokens,
        "repeat": request.repeat,
        "layers": first.config.cut(request.layers).num_layers,
        "torch": version("torch"),
        "torch_xla": version("torch_xla"),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def _digest(directory: Path) -> str:
    """The sha256 of the manifest, which has every file's sha256, and of the configuration."""
    digest = hashlib.sha256()
    for name in (MANIFEST, "config.json"):
        digest.update((directory / name).read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, str | None]:
    """What may influence the figures, but may change between reruns."""
    try:
        return {"transformers": version("transformers")}
    except PackageNotFoundError:
        return {"transformers": None}


def check_out(request: BenchRequest, shards: dict[str, Shards]) -> None:
    """Raise InputError if ``out`` is an input, or holds files with a bench's names that no bench wrote."""
    out = request.out
    if out.resolve() in [each.directory.resolve() for each in shards.values()]:
        raise InputError(f"--out {out} is an input. Give another directory; an input is never changed.")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Give --out a directory.")
    if is_journal(out / JOURNAL):
        return
    for name in (*REPORT_FILES, CACHE_FOLDER, *([BF16_FOLDER] if makes_bf16_shards(request, shards) else [])):
        if (out / name).exists():
            raise InputError(f"{out / name} was not written by a bench in {out}. Move it away, or give another --out.")
