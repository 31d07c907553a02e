"""Where the values of the shards come from: a checkpoint, quantized as it is read, or shards made before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from converters.console.errors import InputError
from converters.console.notes import note
from converters.contents import check_finite
from converters.formats.safetensors import CODES
from converters.model.config import ModelConfig
from converters.model.parameters import LM_HEAD
from converters.sources.source import Int8Source, TensorSource
from quantize.formats.int8 import RowErrors, quantize_rows
from quantize.report import FILE_NAME as REPORT
from quantize.report import Report
from quantize.shards.manifest import FILE_NAME as MANIFEST
from quantize.shards.reading import Shards
from quantize.shards.stored import Scheme, StoredParameter, stored_parameters

_SHOWN_NAMES = 3  # of many, in a note


class Block(NamedTuple):
    """Some rows of a parameter in stored form: values, the scale [rows, 1] of a quantized one, and what that cost."""

    values: torch.Tensor
    scale: torch.Tensor | None
    errors: RowErrors | None


class BlockSource(Protocol):
    """Where the values of the shards come from, in their stored form and before the split."""

    def block(self, stored: StoredParameter, start: int, stop: int) -> Block:
        """Rows [start, stop); called in several threads."""
        ...

    def passed(self, stored: StoredParameter, start: int | None, block: Block) -> None:
        """Take note of a block that has been written, of padding where ``start`` is None; in the order of the files."""
        ...

    def state(self) -> Any:
        """What ``restore`` needs, in a rerun, to know of the blocks that passed in this one; as JSON holds it."""
        ...

    def restore(self, state: Any) -> None: ...

    def files(self) -> list[Path]:
        """The files that values are read from."""
        ...

    def small_files(self) -> dict[str, bytes]:
        """The files beside the shards: file name -> content."""
        ...


class Quantizer:
    """Blocks of a checkpoint, quantized as they are read. Scales see whole rows, so chips never change them.

    What the checkpoint holds as int8 values and scales already is taken as it is.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._kept = _int8_names(source)
        self.report = Report()

    def note_int8(self, config: ModelConfig, scheme: Scheme) -> None:
        """Say what becomes of an int8 source's weights: kept, dequantized, or quantized here beside the kept ones."""
        stored = stored_parameters(config, scheme)
        held = self._kept & {each.weight.name for each in stored}
        wanted = {each.weight.name for each in stored if each.scale is not None}
        if held & wanted:
            note(f"int8 values and scales are kept as the source has them: {_listed(held & wanted)}.")
        if held and wanted - held:
            note(f"Quantized here, since the source does not hold them in int8: {_listed(wanted - held)}.")
        if held - wanted:
            hint = " --quantize-lm-head keeps lm_head.weight." if wanted and LM_HEAD.name in held else ""
            note(f"Dequantized from the source's int8 to {config.dtype}: {_listed(held - wanted)}.{hint}")

    def block(self, stored: StoredParameter, start: int, stop: int) -> Block:
        name = stored.weight.name
        if stored.scale is not None and name in self._kept:
            return self._as_it_is(name, stored.scale.name, start, stop)
        weight = self._source.rows(name, start, stop)
        if stored.scale is None:
            weight = weight.to(getattr(torch, stored.weight.dtype))
            check_finite(weight, name)
            return Block(weight, None, None)
        quantized, errors = quantize_rows(weight)
        check_finite(quantized.scale, name)
        return Block(*quantized, errors)

    def _as_it_is(self, name: str, scale_name: str, start: int, stop: int) -> Block:
        """int8 rows of the source and their scales in float32; nothing is lost by it."""
        assert isinstance(self._source, Int8Source)
        values, scale = (self._source.stored_rows(each, start, stop) for each in (name, scale_name))
        check_finite(scale, scale_name)
        nothing = torch.zeros(stop - start, dtype=torch.float64)
        return Block(values, scale.float(), RowErrors(nothing, nothing, nothing))

    def passed(self, stored: StoredParameter, start: int | None, block: Block) -> None:
        if stored.scale is not None:
            self.report.expect(stored.weight.name)
        if start is not None and block.errors is not None:
            self.report.add(stored.weight.name, start, block.errors)

    def state(self) -> Any:
        return self.report.state()

    def restore(self, state: Any) -> None:
        self.report.restore(state)

    def files(self) -> list[Path]:
        return self._source.files()

    def small_files(self) -> dict[str, bytes]:
        return self._source.auxiliary_files() | {REPORT: (json.dumps(self.report.content(), indent=1) + "\n").encode()}


def _int8_names(source: TensorSource) -> set[str]:
    """The names of the weights that a source holds as int8 values and scales."""
    specs = source.stored_specs(source.config) if isinstance(source, Int8Source) else []
    return {spec.name for spec in specs if spec.code == CODES["int8"]}


def _listed(names: set[str]) -> str:
    """The first names, and how many there are."""
    first, more = sorted(names)[:_SHOWN_NAMES], len(names) - _SHOWN_NAMES
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


class Resharder:
    """Blocks of finished shards, as they are: values and scales don't depend on the number of chips."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def block(self, stored: StoredParameter, start: int, stop: int) -> Block:
        values = self._shards.rows(stored.weight.name, start, stop)
        scale = None if stored.scale is None else self._shards.rows(stored.scale.name, start, stop)
        return Block(values, scale, None)

    def passed(self, stored: StoredParameter, start: int | None, block: Block) -> None:
        """Nothing is kept: the report comes with the shards."""

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        """Nothing was kept."""

    def files(self) -> list[Path]:
        """The chips' files, and what goes along: the manifest's fingerprint says nothing of that."""
        directory = self._shards.directory
        names = ("config.json", MANIFEST, REPORT, *self._shards.auxiliary_files())
        return [*self._shards.paths(), *(path for name in names if (path := directory / name).is_file())]

    def small_files(self) -> dict[str, bytes]:
        report = self._shards.directory / REPORT
        if not report.is_file():
            raise InputError(f"{report} is missing. Fetch it again, or quantize the checkpoint again.")
        return self._shards.auxiliary_files() | {REPORT: report.read_bytes()}
