"""A checkpoint, or shards for another number of chips, streamed row block by row block into one file per chip."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from converters.checkpoint import check_finite
from converters.config import ModelConfig
from converters.errors import InputError
from converters.files import SafetensorsWriter, write_json, write_whole
from converters.output import Finished
from converters.source import TensorSource, row_blocks
from quantize.int8 import quantize_rows
from quantize.manifest import FILE_NAME, FileRecord, Manifest, chip_file, describe_tensors
from quantize.partition import Segment, parameter_segments
from quantize.report import FILE_NAME as REPORT
from quantize.report import Report
from quantize.scheme import Scheme, StoredParameter, chip_specs, quantization_config, stored_parameters
from quantize.shards import Shards

Advance = Callable[[int], None]


class BlockSource(Protocol):
    """Where the values of the shards come from, in their stored form and before the split."""

    def block(self, stored: StoredParameter, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows [start, stop): the values, and the scale [stop - start, 1] of a quantized parameter."""
        ...

    def small_files(self) -> dict[str, bytes]:
        """The files beside the shards: file name -> content."""
        ...


class Quantizer:
    """Blocks of a checkpoint, quantized as they are read. Scales see whole rows, so chips never change them."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.report = Report()
        self._reported: dict[str, int] = {}

    def block(self, stored: StoredParameter, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        name = stored.weight.name
        weight = self._source.rows(name, start, stop)
        if stored.scale is None:
            weight = weight.to(getattr(torch, stored.weight.dtype))
            check_finite(weight, name)
            return weight, None
        quantized, errors = quantize_rows(weight)
        check_finite(quantized.scale, name)
        if start >= self._reported.get(name, 0):  # the rows of a repeated KV head count once
            self.report.add(name, errors)
            self._reported[name] = stop
        return quantized

    def small_files(self) -> dict[str, bytes]:
        return self._source.companions() | {REPORT: _json_bytes(self.report.content())}


class Resharder:
    """Blocks of finished shards, as they are: values and scales don't depend on the number of chips."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def block(self, stored: StoredParameter, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        values = self._shards.rows(stored.weight.name, start, stop)
        return values, None if stored.scale is None else self._shards.rows(stored.scale.name, start, stop)

    def small_files(self) -> dict[str, bytes]:
        report = self._shards.directory / REPORT
        if not report.is_file():
            raise InputError(f"{report} is missing. Fetch it again, or quantize the checkpoint again.")
        return self._shards.companions() | {REPORT: report.read_bytes()}


@dataclass(frozen=True)
class Sharding:
    """The shards to be made: of which model, in which scheme, for how many chips, and which chips' files."""

    config: ModelConfig
    scheme: Scheme
    chips: int
    only_chips: tuple[int, ...]
    source_fingerprint: str

    def arguments(self) -> dict[str, Any]:
        """What the result is a function of."""
        return {
            "source_fingerprint": self.source_fingerprint,
            "layers": self.config.num_layers,
            "scheme": self.scheme.name,
            "quantized_lm_head": self.scheme.quantize_lm_head,
            "chips": self.chips,
            "only_chips": list(self.only_chips),
        }


def write_shards(sharding: Sharding, source: BlockSource, out: Path, advance: Advance) -> None:
    """Write the chips' files, then the small files, then the manifest. ``advance`` is told bytes as they are done."""
    config, scheme, chips = sharding.config, sharding.scheme, sharding.chips
    specs = chip_specs(config, scheme, chips)
    with ExitStack() as cleanup:
        writers = {}
        for chip in sharding.only_chips:
            writers[chip] = SafetensorsWriter(out / chip_file(chip, chips), specs)
            cleanup.callback(writers[chip].abandon)
        for stored in stored_parameters(config, scheme):
            _write_parameter(stored, config, chips, source, writers, advance)
        for writer in writers.values():
            writer.close()
        cleanup.pop_all()
    for name, content in source.small_files().items():
        write_whole(out / name, content)
    fields = config.to_hf()
    if scheme.name == "int8":
        fields["quantization_config"] = quantization_config(scheme)
    write_json(out / "config.json", fields)
    records = {chip: FileRecord(writer.nbytes, writer.sha256) for chip, writer in writers.items()}
    tensors = describe_tensors(config, scheme, chips)
    Manifest(config.name, chips, scheme, sharding.source_fingerprint, tensors, records).write(out)


def finished(out: Path) -> Finished | None:
    """What a finished directory of shards was made with; None for any other directory."""
    if not (out / FILE_NAME).is_file():
        return None
    shards = Shards(out)
    manifest = shards.manifest
    chips = tuple(sorted(manifest.files))
    sharding = Sharding(shards.config, manifest.scheme, manifest.chips, chips, manifest.source_fingerprint)
    return Finished(sharding.arguments(), (REPORT, *(chip_file(chip, manifest.chips) for chip in chips)))


def _write_parameter(
    stored: StoredParameter,
    config: ModelConfig,
    chips: int,
    source: BlockSource,
    writers: dict[int, SafetensorsWriter],
    advance: Advance,
) -> None:
    """Append one parameter, and its scale behind it, to every chip's file."""
    parameter = stored.weight.parameter
    shard = parameter.row.shard
    if shard == 0:
        for chip, segments in enumerate(parameter_segments(config, parameter, chips)):
            if chip in writers:
                _write_rows(stored, segments, source, writers[chip], advance)
        return
    columns = None if shard is None else parameter_segments(config, parameter, chips)
    scales = []
    for start, stop in row_blocks(0, parameter.shape[0], parameter.width):
        values, scale = source.block(stored, start, stop)
        scales.append(scale)
        for chip, writer in writers.items():
            local = values if columns is None else _take_columns(values, columns[chip])
            writer.append(local)
            advance(local.nbytes)
    if stored.scale is not None:
        for writer in writers.values():
            writer.append(torch.cat(scales))


def _write_rows(
    stored: StoredParameter,
    segments: Sequence[Segment],
    source: BlockSource,
    writer: SafetensorsWriter,
    advance: Advance,
) -> None:
    """Append the rows that one chip holds of a parameter split along its rows, then their scale."""
    scales = []
    for values, scale in _row_pieces(stored, segments, source):
        writer.append(values)
        scales.append(scale)
        advance(values.nbytes)
    if stored.scale is not None:
        writer.append(torch.cat(scales))


def _row_pieces(
    stored: StoredParameter, segments: Sequence[Segment], source: BlockSource
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    parameter = stored.weight.parameter
    for segment in segments:
        first = segment.start or 0
        for start, stop in row_blocks(first, first + segment.length, parameter.width):
            if segment.start is None:
                yield _zero_rows(stored, stop - start)
            else:
                yield source.block(stored, start, stop)


def _zero_rows(stored: StoredParameter, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Padding: zeros, whose scale is 1 like that of any row of zeros."""
    width = stored.weight.parameter.shape[1:]
    values = torch.zeros((count, *width), dtype=getattr(torch, stored.weight.dtype))
    return values, None if stored.scale is None else torch.ones((count, 1), dtype=torch.float32)


def _take_columns(values: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """The columns that one chip holds of rows [n, in]; padding is zeros."""
    pieces = [
        values.new_zeros((values.shape[0], segment.length))
        if segment.start is None
        else values[:, segment.start : segment.start + segment.length]
        for segment in segments
    ]
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
