"""The checkpoint directory that llama-convert writes: Hugging Face's layout, or a seed that stands for it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters import random_init
from converters.companions import COMPANIONS
from converters.config import read_json
from converters.errors import InputError
from converters.files import (
    SafetensorsWriter,
    TensorSpec,
    safetensors_bytes,
    tensors_before,
    write_json,
    write_whole,
)
from converters.form import Form, block_tasks
from converters.hf import open_hf
from converters.hf_files import INDEX, weight_map
from converters.journal import Journal
from converters.meta import is_meta, open_meta
from converters.output import Finished, check_finished
from converters.parallel import in_order
from converters.progress import Advance
from converters.registry import find_opener
from converters.self_check import SelfCheck, check_configuration, check_files
from converters.source import TensorSource

COMPANION_NAMES = frozenset(COMPANIONS)
# What is kept in the index's metadata, or beside the seed: the arguments, and the digest of the self-check.
_CONVERSION = "conversion"
_DIGEST = "names_and_shapes_sha256"


@dataclass(frozen=True)
class ModelFile:
    """One model-0000i-of-0000n.safetensors: its name and the tensors in it."""

    name: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return safetensors_bytes(self.specs)


def open_source(path: Path) -> TensorSource:
    """Open whatever holds a model's weights: a checkpoint, a Hugging Face or Meta directory, a GGUF file, shards.

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
    registered = find_opener(path)
    if registered is not None:
        return registered(path)
    if (path / "shards.json").exists():
        raise InputError(
            f"{path} holds shards, and nothing that reads them is announced by this installation. Install it again "
            "(pip install -e .)."
        )
    check_finished(path, "llama-convert", INDEX)
    if (path / random_init.FILE_NAME).exists():
        return random_init.open_random_init(path)
    return open_meta(path) if is_meta(path) else open_hf(path)


def plan_files(form: Form, max_shard_bytes: int) -> list[ModelFile]:
    """Share the tensors, in their order, among files of at most ``max_shard_bytes`` of values each.

    A tensor larger than that has a file of its own.
    """
    groups: list[list[TensorSpec]] = []
    room = 0
    for spec in form.specs:
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
    source: TensorSource, form: Form, out: Path, files: list[ModelFile], arguments: dict[str, Any], advance: Advance
) -> SelfCheck:
    """Write the checkpoint as files, the index last, going on where an interrupted run stopped.

    A file that has its name is whole and stays. ``form`` is how the source's tensors are held; ``advance`` is told
    bytes as they are done. Returns what the files were found to hold.
    """
    _write_small_files(source, form.config.to_hf() | form.fields, out)
    with closing(Journal(out)) as journal:
        for file in files:
            if (out / file.name).exists():
                advance(file.nbytes)
            else:
                _write_file(form, out, file, journal, advance)
        journal.wait()
        check = check_files(out, [file.name for file in files])
        write_json(out / INDEX, _index(files, arguments, check))
    return check


def _write_file(form: Form, out: Path, file: ModelFile, journal: Journal, advance: Advance) -> None:
    position, _ = journal.read([file.name])
    done = tensors_before(file.specs, position)
    writer = SafetensorsWriter(out / file.name, file.specs, position if done else 0)
    advance(writer.nbytes)
    try:
        for spec, stop, block in in_order(block_tasks(form, file.specs[done or 0 :])):
            writer.append(block)
            advance(block.nbytes, spec.name)
            if stop == spec.shape[0]:
                journal.note({file.name: writer})
        writer.close()
    finally:
        writer.stop()


def write_seed(source: random_init.RandomSource, out: Path, arguments: dict[str, Any]) -> SelfCheck:
    """Write the checkpoint as its configuration and the seed that its weights come from."""
    _write_small_files(source, source.config.to_hf(), out)
    check = check_configuration(out)
    record = random_init.random_init_record(source.seed) | {_DIGEST: check.sha256, _CONVERSION: arguments}
    write_json(out / random_init.FILE_NAME, record)
    return check


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


def _write_small_files(source: TensorSource, fields: dict[str, Any], out: Path) -> None:
    write_json(out / "config.json", fields)
    for name, content in source.companions().items():
        write_whole(out / name, content)


def _index(files: list[ModelFile], arguments: dict[str, Any], check: SelfCheck) -> dict[str, Any]:
    return {
        "metadata": {
            "total_parameters": check.parameters,
            "total_size": sum(spec.nbytes for file in files for spec in file.specs),
            _DIGEST: check.sha256,
            _CONVERSION: arguments,
        },
        "weight_map": {spec.name: file.name for file in files for spec in file.specs},
    }
