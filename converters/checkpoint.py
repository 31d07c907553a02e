"""The checkpoint directory that llama-convert writes: Hugging Face's layout, or a seed that stands for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import random_init
from converters.config import ModelConfig, read_json
from converters.errors import InputError
from converters.files import (
    CODES,
    SafetensorsWriter,
    TensorSpec,
    safetensors_bytes,
    tensors_before,
    write_json,
    write_whole,
)
from converters.hf import COMPANIONS, INDEX, open_hf, weight_map
from converters.journal import Journal
from converters.layout import Parameter, parameters
from converters.meta import is_meta, open_meta
from converters.output import Finished, check_finished
from converters.parallel import in_order
from converters.progress import Advance
from converters.source import TensorSource, row_blocks

if TYPE_CHECKING:
    import torch

COMPANION_NAMES = frozenset(COMPANIONS)
_CONVERSION = "conversion"  # the arguments, kept in the index's metadata or beside the seed


@dataclass(frozen=True)
class ModelFile:
    """One model-0000i-of-0000n.safetensors: its name and the parameters in it."""

    name: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return safetensors_bytes(self.specs)


def open_source(path: Path) -> TensorSource:
    """Open whatever holds a model's weights: a checkpoint, a Hugging Face or Meta directory, or a GGUF file.

    Nothing but headers is read. Raises InputError where the path holds no such thing.
    """
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(
                f"{path} is a file of no known kind. Give a .gguf file, or a directory of Hugging Face's or Meta's."
            )
        from converters.gguf import open_gguf

        return open_gguf(path)
    if not path.exists():
        raise InputError(f"{path} does not exist. Give a .gguf file, or a directory of Hugging Face's or Meta's.")
    check_finished(path, "llama-convert", INDEX)
    if (path / "shards.json").exists():
        raise InputError(f"{path} holds shards of a quantized model; give the checkpoint they were made from.")
    if (path / random_init.FILE_NAME).exists():
        return random_init.open_random_init(path)
    return open_meta(path) if is_meta(path) else open_hf(path)


def plan_files(config: ModelConfig, max_shard_bytes: int) -> list[ModelFile]:
    """Share the parameters, in the table's order, among files of at most ``max_shard_bytes`` of values each.

    A parameter larger than that has a file of its own.
    """
    code = CODES[config.dtype]
    groups: list[list[TensorSpec]] = []
    room = 0
    for parameter in parameters(config):
        spec = TensorSpec(parameter.name, code, parameter.shape)
        if not groups or spec.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    return [
        ModelFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def write_files(
    source: TensorSource,
    config: ModelConfig,
    out: Path,
    files: list[ModelFile],
    arguments: dict[str, Any],
    advance: Advance,
) -> None:
    """Write the checkpoint as files, the index last, going on where an interrupted run stopped.

    A file that has its name is whole and stays. ``config`` is the source's, with the dtype to write; ``advance`` is
    told bytes as they are done.
    """
    _write_small_files(source, config, out)
    with closing(Journal(out)) as journal:
        for file in files:
            if (out / file.name).exists():
                advance(file.nbytes)
            else:
                _write_file(source, config, out, file, journal, advance)
        journal.wait()
        write_json(out / INDEX, _index(config, files, arguments))


def _write_file(
    source: TensorSource,
    config: ModelConfig,
    out: Path,
    file: ModelFile,
    journal: Journal,
    advance: Advance,
) -> None:
    position, _ = journal.read([file.name])
    done = tensors_before(file.specs, position)
    writer = SafetensorsWriter(out / file.name, file.specs, position if done else 0)
    advance(writer.nbytes)
    table = {parameter.name: parameter for parameter in parameters(config)}
    left = [table[spec.name] for spec in file.specs[done or 0 :]]
    try:
        for parameter, stop, block in in_order(block_tasks(source, left, config.dtype)):
            writer.append(block)
            advance(block.nbytes, parameter.name)
            if stop == parameter.shape[0]:
                journal.note({file.name: writer})
        writer.close()
    finally:
        writer.stop()


def block_tasks(
    source: TensorSource, wanted: list[Parameter], dtype: str
) -> Iterator[Callable[[], tuple[Parameter, int, torch.Tensor]]]:
    """Tasks that read the blocks of these parameters in order: each gives the row at which it stops, and the block."""
    import torch

    def read(parameter: Parameter, start: int, stop: int) -> tuple[Parameter, int, torch.Tensor]:
        block = source.rows(parameter.name, start, stop).to(getattr(torch, dtype))
        check_finite(block, parameter.name)
        return parameter, stop, block

    for parameter in wanted:
        for start, stop in row_blocks(0, parameter.shape[0], parameter.width):
            yield partial(read, parameter, start, stop)


def write_seed(source: random_init.RandomSource, out: Path, arguments: dict[str, Any]) -> None:
    """Write the checkpoint as its configuration and the seed that its weights come from."""
    _write_small_files(source, source.config, out)
    write_json(out / random_init.FILE_NAME, random_init.random_init_record(source.seed) | {_CONVERSION: arguments})


def finished(out: Path) -> Finished | None:
    """What a checkpoint directory that llama-convert finished was made with; None for any other directory."""
    if (out / INDEX).is_file():
        index = read_json(out / INDEX)
        metadata = index.get("metadata") if isinstance(index, dict) else None
        arguments = metadata.get(_CONVERSION) if isinstance(metadata, dict) else None
        files = tuple(dict.fromkeys(weight_map(out / INDEX).values())) if arguments else ()
    elif (out / random_init.FILE_NAME).is_file():
        record = read_json(out / random_init.FILE_NAME)
        arguments = record.get(_CONVERSION) if isinstance(record, dict) else None
        files = ()
    else:
        return None
    return Finished(arguments, ("config.json", *files)) if isinstance(arguments, dict) else None


def _write_small_files(source: TensorSource, config: ModelConfig, out: Path) -> None:
    write_json(out / "config.json", config.to_hf())
    for name, content in source.companions().items():
        write_whole(out / name, content)


def check_finite(block: torch.Tensor, name: str) -> None:
    """Raise InputError, naming the tensor, where a block of weights holds NaN or an infinity."""
    if block.abs().amax().isfinite():  # several times as fast as isfinite of every value
        return
    narrow = " (or values too large for float16)" if str(block.dtype) == "torch.float16" else ""
    raise InputError(
        f"The tensor {name} holds NaN or infinite values{narrow}. Fetch the source again, or give a wider --dtype."
    )


def _index(config: ModelConfig, files: list[ModelFile], arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "metadata": {
            "total_parameters": sum(parameter.elements for parameter in parameters(config)),
            "total_size": sum(spec.nbytes for file in files for spec in file.specs),
            _CONVERSION: arguments,
        },
        "weight_map": {spec.name: file.name for file in files for spec in file.specs},
    }
