"""A checkpoint, or shards for another number of chips, streamed row block by row block into one file per chip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from converters.console.progress import Advance
from converters.files.parallel import in_order
from converters.files.row_blocks import row_blocks
from converters.files.whole import json_file
from converters.formats.safetensors import SafetensorsWriter, TensorSpec, safetensors_bytes, safetensors_header
from converters.formats.tensor_writer import tensors_before
from converters.model.config import ModelConfig
from converters.model.families.hf_config import to_hf
from converters.output.claim import Output, Wanted
from converters.output.journal import Journal
from converters.output.state import Finished
from quantize.report import FILE_NAME as REPORT
from quantize.shards.manifest import FILE_NAME, Manifest, chip_file, describe_tensors
from quantize.shards.partition import Segment, Split
from quantize.shards.reading import Shards
from quantize.shards.scheme import Scheme
from quantize.shards.stored import StoredParameter, chip_specs, quantization_fields, stored_parameters
from quantize.values import Block, BlockSource


@dataclass(frozen=True)
class Sharding:
    """The shards to make: the model, the scheme, the number of chips, and which chips' files."""

    config: ModelConfig
    scheme: Scheme
    chips: int
    only_chips: tuple[int, ...]
    source_fingerprint: str
    method: str | None = None  # how values are found, one of METHODS; None for formats without a choice
    calibration: dict[str, Any] | None = None  # the text that was looked at, as the manifest has it

    @property
    def specs(self) -> list[TensorSpec]:
        """The entries of each file."""
        return chip_specs(self.config, self.scheme, self.chips)

    @property
    def file_bytes(self) -> int:
        return safetensors_bytes(self.specs)

    @property
    def nbytes(self) -> int:
        """Of all the files to be made."""
        return self.file_bytes * len(self.only_chips)

    def file_names(self) -> dict[int, str]:
        """By chip, the files to be made."""
        return {chip: chip_file(chip, self.chips) for chip in self.only_chips}

    def arguments(self) -> dict[str, Any]:
        """What the content of the files depends on."""
        return {
            "source_fingerprint": self.source_fingerprint,
            "layers": self.config.num_layers,
            "scheme": self.scheme.default,
            **({"formats": self.scheme.names_by_format} if self.scheme.overrides else {}),
            **({} if self.method is None else {"method": self.method}),
            **({} if self.calibration is None else {"calibration": self.calibration}),
            "quantized_lm_head": self.scheme.quantize_lm_head,
            "chips": self.chips,
        }

    def wanted(self, out: Path, source: BlockSource) -> Wanted:
        """The directory and the files to be made in it."""
        names = (*self.file_names().values(), *source.small_files(), "config.json", FILE_NAME)
        return Wanted("llama-quantize", out, self.arguments(), tuple(source.files()), names)


def write_shards(sharding: Sharding, source: BlockSource, output: Output, advance: Advance) -> None:
    """Write the chips' files, then the small files, then the manifest; resumes an interrupted run.

    Files of other chips from earlier runs stay, and are listed in the manifest. ``advance`` is told bytes as they are
    written.
    """
    config, scheme, chips = sharding.config, sharding.scheme, sharding.chips
    source.restore(output.caller_state)
    _write_chips(sharding, source, output, advance)
    fields = to_hf(config) | quantization_fields(config, scheme)
    output.write(source.small_files() | {"config.json": json_file(fields)})
    tensors = describe_tensors(config, scheme, chips)
    numbers = {chip_file(chip, chips): chip for chip in range(chips)}
    records = {numbers[name]: record for name, record in output.files.items() if name in numbers}
    output.check_sources()
    made_of = (sharding.source_fingerprint, tensors, records, sharding.method, sharding.calibration)
    manifest = Manifest(config.name, chips, scheme, *made_of)
    output.write({FILE_NAME: json_file(manifest.as_json())})


def _write_chips(sharding: Sharding, source: BlockSource, output: Output, advance: Advance) -> None:
    names = {chip: name for chip, name in sharding.file_names().items() if not output.take_whole(name)}
    advance(sharding.file_bytes * (len(sharding.only_chips) - len(names)))
    if names:
        with closing(Journal(output.directory)) as journal:
            for writer in _write_values(sharding, names, source, output, journal, advance):
                writer.publish()


def _write_values(
    sharding: Sharding,
    names: dict[int, str],
    source: BlockSource,
    output: Output,
    journal: Journal,
    advance: Advance,
) -> list[SafetensorsWriter]:
    """Write all values of these chips' files and record them; the files get their names later."""
    specs = sharding.specs
    position, state = journal.read(list(names.values()))
    done = tensors_before(len(safetensors_header(specs)), [spec.nbytes for spec in specs], position)
    if done:
        source.restore(state)
    with ExitStack() as stack:
        writers = {}
        for chip, name in names.items():
            path = output.directory / name
            writers[chip] = SafetensorsWriter(path, specs, position if done else 0, files=len(names))
            stack.callback(writers[chip].stop)
        tasks = piece_tasks(sharding, source, tuple(names), skip=done or 0)
        _write_pieces(tasks, writers, names, source, journal, advance)
        output.add({names[chip]: writer.finish() for chip, writer in writers.items()}, source.state())
        return list(writers.values())


def _write_pieces(
    tasks: Iterator[Callable[[], _Piece]],
    writers: dict[int, SafetensorsWriter],
    names: dict[int, str],
    source: BlockSource,
    journal: Journal,
    advance: Advance,
) -> None:
    """Append the tasks' results to the chips' files, and note the progress at the end of each parameter."""
    by_name = {names[chip]: writer for chip, writer in writers.items()}
    advance(sum(writer.nbytes for writer in writers.values()))
    later: Later = {chip: {} for chip in writers}
    for piece in in_order(tasks):
        _take(piece, writers, later, source)
        advance(piece.nbytes, piece.step.stored.name)
        if piece.step.ends_parameter:
            journal.note(by_name, source.state(), at_once=source.is_slow)
    journal.wait()


def finished(out: Path) -> Finished | None:
    """What a directory of shards without a record was made with; None for any other directory."""
    if not (out / FILE_NAME).is_file():
        return None
    shards = Shards(out)
    manifest = shards.manifest
    chips = tuple(sorted(manifest.files))
    sharding = Sharding(
        shards.config,
        manifest.scheme,
        manifest.chips,
        chips,
        manifest.source_fingerprint,
        manifest.method,
        manifest.calibration,
    )
    files = {chip_file(chip, manifest.chips): record for chip, record in manifest.files.items()}
    return Finished(sharding.arguments(), files | dict.fromkeys((REPORT, "config.json", FILE_NAME)))


@dataclass(frozen=True)
class _Step:
    """Some rows of a parameter on their way into the files of ``chips``; ``start`` None means rows of padding."""

    stored: StoredParameter
    start: int | None
    count: int
    chips: tuple[int, ...]
    ends_tensor: bool  # its first tensor, in the files of these chips: the others come next
    ends_parameter: bool  # in all files


class _Piece(NamedTuple):
    """A step done: for each of its chips what to append, by suffix; of the first tensor as the file holds it."""

    step: _Step
    parts: list[dict[str, torch.Tensor]]
    block: Block

    @property
    def nbytes(self) -> int:
        """Of the files, but for rounding."""
        return sum(tensor.nbytes for part in self.parts for tensor in part.values())


# By chip and suffix, blocks of the tensors that follow a parameter's first one in the file.
Later = dict[int, dict[str, list[torch.Tensor]]]


def piece_tasks(
    sharding: Sharding, source: BlockSource, chips: tuple[int, ...], skip: int = 0
) -> Iterator[Callable[[], _Piece]]:
    """The work on all parameters after the first ``skip`` tensors, in the order of the files of ``chips``."""
    tensors = 0
    for stored in stored_parameters(sharding.config, sharding.scheme):
        tensors += len(stored.tensors)
        if tensors <= skip:
            continue
        columns = {
            each.part.suffix: each.split(sharding.config, sharding.chips) for each in stored.tensors if each.shard == 1
        }
        source.prepare(stored)
        for step in _steps(stored, sharding, chips):
            yield partial(_do, step, columns, source)


def _steps(stored: StoredParameter, sharding: Sharding, chips: tuple[int, ...]) -> Iterator[_Step]:
    """A parameter split along its rows goes chip by chip; any other, block by block into all files."""
    parameter = stored.parameter
    if parameter.row.shard != 0:
        for start, stop in row_blocks(0, parameter.shape[0], parameter.width):
            last = stop == parameter.shape[0]
            yield _Step(stored, start, stop - start, chips, last, last)
        return
    segments = stored.tensors[0].split(sharding.config, sharding.chips).segments
    for chip in chips:
        blocks = [block for segment in segments[chip] for block in _segment_blocks(segment, parameter.width)]
        for number, (start, count) in enumerate(blocks, 1):
            last = number == len(blocks)
            yield _Step(stored, start, count, (chip,), last, last and chip == chips[-1])


def _segment_blocks(segment: Segment, width: int) -> Iterator[tuple[int | None, int]]:
    first = segment.start or 0
    for start, stop in row_blocks(first, first + segment.length, width):
        yield (None if segment.start is None else start), stop - start


def _do(step: _Step, columns: dict[str, Split], source: BlockSource) -> _Piece:
    tensors = {each.part.suffix: each for each in step.stored.tensors}
    if step.start is None:
        block = Block({suffix: each.fill_rows(step.count) for suffix, each in tensors.items()})
    else:
        block = source.block(step.stored, step.start, step.start + step.count)
    parts = [dict(block.tensors) for _ in step.chips]
    for suffix, split in columns.items():
        values, stored = block.tensors[suffix], tensors[suffix].part
        column = stored.fill_column
        fill = values.new_full((1, 1), stored.fill) if column is None else block.tensors[column]
        if split.repeat > 1:
            values = values.repeat_interleave(split.repeat, dim=1)
        for chip, part in zip(step.chips, parts, strict=True):
            part[suffix] = _take_columns(values, split.segments[chip], fill)
    first = step.stored.tensors[0].part
    for part in parts if columns else parts[:1]:
        part[first.suffix] = first.to_file(part[first.suffix])
    return _Piece(step, parts if columns else [parts[0]] * len(parts), block)


def _take(piece: _Piece, writers: dict[int, SafetensorsWriter], later: Later, source: BlockSource) -> None:
    """Append a piece's part of the first tensor to its files; ``later`` gathers the others until the first one ends."""
    step = piece.step
    first, *others = (each.part for each in step.stored.tensors)
    for chip, tensors in zip(step.chips, piece.parts, strict=True):
        writers[chip].append(tensors[first.suffix])
        for part in others:
            later[chip].setdefault(part.suffix, []).append(tensors[part.suffix])
            if step.ends_tensor:
                writers[chip].append(part.to_file(torch.cat(later[chip].pop(part.suffix))))
    source.passed(step.stored, step.start, piece.block)


def _take_columns(values: torch.Tensor, segments: Sequence[Segment], fill: torch.Tensor) -> torch.Tensor:
    """The columns that one chip holds of rows [n, in]; columns of padding are ``fill``, [n, 1] or [1, 1]."""
    pieces = [
        fill.expand(len(values), segment.length)
        if segment.start is None
        else values[:, segment.start : segment.start + segment.length]
        for segment in segments
    ]
    return torch.cat(pieces, dim=1)
