"""The checkpoint directory that llama-convert writes: Hugging Face's layout, or a seed that stands for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.console.errors import InputError
from converters.console.progress import Advance
from converters.contents import Contents
from converters.files.json_file import read_json
from converters.files.whole import FileRecord, json_file
from converters.formats.safetensors import SafetensorsWriter, TensorSpec, safetensors_bytes, safetensors_header
from converters.formats.tensor_writer import tensors_before
from converters.model.families.hf_config import to_hf
from converters.output.claim import Output
from converters.output.journal import Journal
from converters.output.record import WRITTEN, read_file_record, read_record, verify_files
from converters.output.state import Finished, check_finished
from converters.self_check import SelfCheck, check_configuration, check_files
from converters.sources import random_init
from converters.sources.huggingface.files import INDEX, weight_map
from converters.sources.source import TensorSource
from converters.weight_files import write_weight_file

# Keys in the index's metadata, or beside the seed: the arguments, the self-check's digest, the files' digests.
_CONVERSION = "conversion"
_DIGEST = "names_and_shapes_sha256"
_FILES = "files"


@dataclass(frozen=True)
class ModelFile:
    """One model-0000i-of-0000n.safetensors: its name and the tensors in it, as a WeightFile."""

    name: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return safetensors_bytes(self.specs)

    def tensors_before(self, position: int) -> int | None:
        return tensors_before(len(safetensors_header(self.specs)), [spec.nbytes for spec in self.specs], position)

    def writer(self, directory: Path, resume_at: int) -> SafetensorsWriter:
        return SafetensorsWriter(directory / self.name, self.specs, resume_at)


def plan_files(contents: Contents, max_shard_bytes: int) -> list[ModelFile]:
    """Distribute the tensors, in order, over files of at most ``max_shard_bytes`` of values each.

    A larger tensor gets a file of its own.
    """
    groups: list[list[TensorSpec]] = []
    room = 0
    for spec in contents.specs:
        if not groups or spec.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    return [
        ModelFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def file_names(source: TensorSource, files: list[ModelFile]) -> tuple[str, ...]:
    """All files of a checkpoint with these ``files`` of weights; without any, those of a seed."""
    last = INDEX if files else random_init.FILE_NAME
    return ("config.json", *source.auxiliary_files(), *(file.name for file in files), last)


def write_files(
    source: TensorSource, contents: Contents, output: Output, files: list[ModelFile], advance: Advance
) -> SelfCheck:
    """Write the checkpoint as files, the index last, going on where an interrupted run stopped.

    A file that has its name is whole and stays. ``advance`` is called with the number of bytes done. Returns what the
    files were found to hold. Raises InputError for values that can't be read or are not finite, and where the source
    changed meanwhile.
    """
    out = output.directory
    _write_small_files(source, to_hf(contents.config) | contents.fields, output)
    with closing(Journal(out)) as journal:
        for file in files:
            write_weight_file(contents, output, file, journal, advance)
        journal.wait()
        check = check_files(out, [file.name for file in files])
        output.check_sources()
        output.write({INDEX: json_file(_index(files, output, check))})
    return check


def write_seed(source: random_init.RandomSource, output: Output) -> SelfCheck:
    """Write the checkpoint as its configuration and the seed that its weights come from."""
    _write_small_files(source, to_hf(source.config), output)
    check = check_configuration(output.directory)
    files = {name: file.as_json() for name, file in output.files.items()}
    record = random_init.random_init_record(source.seed)
    record |= {_DIGEST: check.sha256, _CONVERSION: output.arguments, _FILES: files}
    output.write({random_init.FILE_NAME: json_file(record)})
    return check


def verify(out: Path, advance: Callable[[int], None]) -> dict[str, FileRecord]:
    """Read every file of a finished checkpoint and compare it with its digest. Returns the files' records.

    ``advance`` is called with the number of bytes read. Raises InputError, naming the file, where one is missing or has
    changed, and where there are no digests.
    """
    check_finished(out, "llama-convert", INDEX)
    files = _recorded_files(out)
    verify_files(out, files, "llama-convert", advance)
    if (out / random_init.FILE_NAME).is_file():
        written = _described(out, random_init.FILE_NAME).get(_CONVERSION)
        if isinstance(written, dict) and written.get("source_fingerprint") != _seed_fingerprint(out):
            raise InputError(
                f"{out / random_init.FILE_NAME} has changed since it was written: it stands for other weights. Run its "
                "llama-convert again with --force."
            )
    return files


def finished(out: Path) -> Finished | None:
    """How llama-convert made a checkpoint directory that has no record; None for any other directory.

    Raises InputError where its last file is damaged.
    """
    for last in (INDEX, random_init.FILE_NAME):
        if (out / last).is_file():
            described = _described(out, last)
            if not isinstance(described.get(_CONVERSION), dict):
                return None
            names = weight_map(out / INDEX).values() if last == INDEX else ()
            files = dict.fromkeys(("config.json", *names, last)) | _digests(described, out / last)
            arguments = described[_CONVERSION]
            if last != INDEX:
                arguments = arguments | {"source_fingerprint": _seed_fingerprint(out)}
            return Finished(arguments, files)
    return None


def _seed_fingerprint(out: Path) -> str:
    """The fingerprint of a seed's two files as they are now; empty where they can't be read."""
    try:
        return random_init.open_random_init(out).fingerprint()
    except InputError:
        return ""


def _described(out: Path, last: str) -> dict[str, Any]:
    """What a checkpoint's last file says about the conversion; empty where it says nothing."""
    content = read_json(out / last)
    described = content.get("metadata") if last == INDEX and isinstance(content, dict) else content
    return described if isinstance(described, dict) else {}


def _digests(described: dict[str, Any], where: Path) -> dict[str, FileRecord]:
    entries = described.get(_FILES)
    entries = entries if isinstance(entries, dict) else {}
    return {name: read_file_record(entry, where, name) for name, entry in entries.items()}


def _recorded_files(out: Path) -> dict[str, FileRecord]:
    """The digests of a finished checkpoint's files: of all, or without a record, of those that the last file names."""
    if (out / WRITTEN).is_file():
        return read_record(out / WRITTEN).files
    last = next((name for name in (INDEX, random_init.FILE_NAME) if (out / name).is_file()), None)
    files = _digests(_described(out, last), out / last) if last else {}
    if not files:
        raise InputError(
            f"{out} keeps no digests: it was not written by this version of llama-convert. Convert again to have them."
        )
    return files


def _write_small_files(source: TensorSource, fields: dict[str, Any], output: Output) -> None:
    output.write({"config.json": json_file(fields)} | source.auxiliary_files())


def _index(files: list[ModelFile], output: Output, check: SelfCheck) -> dict[str, Any]:
    return {
        "metadata": {
            "total_parameters": check.parameters,
            "total_size": sum(spec.nbytes for file in files for spec in file.specs),
            _DIGEST: check.sha256,
            _CONVERSION: output.arguments,
            _FILES: {file.name: output.files[file.name].as_json() for file in files},
        },
        "weight_map": {spec.name: file.name for file in files for spec in file.specs},
    }
