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

    shards: Path
    bf16_shards: Path | None
    figures: tuple[str, ...]
    sizes: Sizes
    repeat: int
    minutes: float
    layers: int | None
    out: Path
    force: bool

    @property
    def makes_bf16_shards(self) -> bool:
        """Whether figure 5 is asked for without shards for it."""
        return "5" in self.figures and self.bf16_shards is None


def arguments(request: BenchRequest, shards: Shards) -> dict[str, Any]:
    """What determines the figures: sizes, shards and the machine. Raises InputError for unsuitable shards."""
    if "5" in request.figures and shards.manifest.scheme.name != "int8":
        raise InputError(
            f"Figure 5 compares int8 with bfloat16, and {request.shards} holds bfloat16 shards. Give int8 shards as "
            "--shards, or leave figure 5 out with --figures."
        )
    sizes = request.sizes
    shards.config.check_context(max(sizes.max_seq_lens))
    return {
        "model": shards.manifest.model,
        "shards_digest": _digest(request.shards),
        "bf16_shards_digest": _bf16_digest(request, shards),
        "figures": list(request.figures),
        "batch_sizes": list(sizes.batch_sizes),
        "prompt_lens": list(sizes.prompt_lens),
        "max_seq_lens": list(sizes.max_seq_lens),
        "max_new_tokens": sizes.new_tokens,
        "repeat": request.repeat,
        "layers": shards.config.cut(request.layers).num_layers,
        "torch": version("torch"),
        "torch_xla": version("torch_xla"),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def _bf16_digest(request: BenchRequest, shards: Shards) -> str | None:
    """The digest of --bf16-shards. Raises InputError if they are not bfloat16, or of another model or chip count."""
    if request.bf16_shards is None:
        return None
    other = Shards(request.bf16_shards)
    other.require(range(other.chips))
    if other.manifest.scheme.name != "bf16":
        raise InputError(f"--bf16-shards {request.bf16_shards} holds int8 shards. Give some made with --bf16.")
    if other.config.with_dtype("bfloat16") != shards.config.with_dtype("bfloat16"):
        raise InputError(
            f"{request.bf16_shards} holds another model than {request.shards}. Give shards of the same checkpoint."
        )
    if other.chips != shards.chips:
        raise InputError(
            f"{request.bf16_shards} is for {other.chips} chips and {request.shards} for {shards.chips}. Re-shard one "
            "of them with llama-quantize --chips."
        )
    return _digest(request.bf16_shards)


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


def check_out(request: BenchRequest) -> None:
    """Raise InputError if ``out`` is an input, or holds files with a bench's names that no bench wrote."""
    out = request.out
    inputs = [path.resolve() for path in (request.shards, request.bf16_shards) if path is not None]
    if out.resolve() in inputs:
        raise InputError(f"--out {out} is an input. Give another directory; an input is never changed.")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Give --out a directory.")
    if is_journal(out / JOURNAL):
        return
    for name in (*REPORT_FILES, CACHE_FOLDER, *([BF16_FOLDER] if request.makes_bf16_shards else [])):
        if (out / name).exists():
            raise InputError(f"{out / name} was not written by a bench in {out}. Move it away, or give another --out.")
