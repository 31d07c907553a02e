"""Where the values of the shards come from: a checkpoint, quantized as it is read, or shards made before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from converters.errors import InputError
from converters.form import check_finite
from converters.source import TensorSource
from quantize.int8 import RowErrors, quantize_rows
from quantize.report import FILE_NAME as REPORT
from quantize.report import Report
from quantize.scheme import StoredParameter
from quantize.shards import Shards


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
    """Blocks of a checkpoint, quantized as they are read. Scales see whole rows, so chips never change them."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.report = Report()

    def block(self, stored: StoredParameter, start: int, stop: int) -> Block:
        name = stored.weight.name
        weight = self._source.rows(name, start, stop)
        if stored.scale is None:
            weight = weight.to(getattr(torch, stored.weight.dtype))
            check_finite(weight, name)
            return Block(weight, None, None)
        quantized, errors = quantize_rows(weight)
        check_finite(quantized.scale, name)
        return Block(*quantized, errors)

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
        return self._source.companions() | {REPORT: (json.dumps(self.report.content(), indent=1) + "\n").encode()}


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
        return self._shards.paths()

    def small_files(self) -> dict[str, bytes]:
        report = self._shards.directory / REPORT
        if not report.is_file():
            raise InputError(f"{report} is missing. Fetch it again, or quantize the checkpoint again.")
        return self._shards.companions() | {REPORT: report.read_bytes()}
