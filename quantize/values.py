"""Where the values of the shards come from: a checkpoint, quantized as it is read, or shards made before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from converters.console.errors import InputError
from converters.contents import check_finite
from converters.model.config import ModelConfig
from converters.sources.codes import CodedSource
from converters.sources.source import TensorSource
from quantize.calibration.moments import Moments, with_output_errors
from quantize.formats.weight_format import Encoded, RowErrors
from quantize.kept import Kept
from quantize.report import FILE_NAME as REPORT
from quantize.report import Report
from quantize.shards.manifest import FILE_NAME as MANIFEST
from quantize.shards.reading import Shards
from quantize.shards.scheme import Scheme
from quantize.shards.stored import StoredParameter, stored_parameters


class Block(NamedTuple):
    """Some rows of a parameter in stored form: its tensors by suffix, and what that cost where rows were quantized."""

    tensors: dict[str, torch.Tensor]
    errors: RowErrors | None = None


class BlockSource(Protocol):
    """Where the values of the shards come from, in their stored form and before the split."""

    is_slow: bool  # whether a parameter takes so long that its end is worth noting for a rerun, however small it is

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        """Called once it is sure that there is something to write, to ``directory``; never in a dry run."""
        ...

    def prepare(self, stored: StoredParameter) -> None:
        """Called before the first block of a parameter is asked for, in the order of the files and in one thread."""
        ...

    def block(self, stored: StoredParameter, start: int, stop: int) -> Block:
        """Rows [start, stop); called in several threads."""
        ...

    def passed(self, stored: StoredParameter, start: int | None, block: Block) -> None:
        """Called for every block after it was written, in the order of the files; ``start`` is None for padding."""
        ...

    def close(self) -> None:
        """Called when all that was asked for is written."""
        ...

    def state(self) -> Any:
        """What ``restore`` needs in a rerun to know the blocks that were written; as JSON holds it."""
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

    What the checkpoint holds in the wanted format already is taken as it is.
    """

    is_slow = False

    def __init__(self, source: TensorSource, search: bool = True, moments: Moments | None = None) -> None:
        """``search`` for scales of least squared error, where a format can, in place of the largest magnitude's.

        With ``moments`` the error is weighted with those of the inputs, and the report has that of the outputs.
        """
        self._source, self._search, self._moments = source, search, moments
        self._found = Kept(source) if isinstance(source, CodedSource) else None
        self.report = Report()

    def kept(self, config: ModelConfig, scheme: Scheme) -> frozenset[str]:
        """The weights that are taken as the source has them."""
        stored = stored_parameters(config, scheme) if self._found else []
        return frozenset(each.name for each in stored if self._found.holds(each.name, each.format))

    def note_kept(self, config: ModelConfig, scheme: Scheme) -> None:
        """Say which weights of a quantized source are kept, dequantized, quantized again, or here beside kept ones."""
        if self._found is not None:
            self._found.note(config, scheme)

    def block(self, stored: StoredParameter, start: int, stop: int) -> Block:
        if self._found is not None and self._found.holds(stored.name, stored.format):
            return self._as_it_is(stored, start, stop)
        encoded = self._encoded(stored, start, stop)
        for tensor in encoded.tensors.values():
            _check_finite(tensor, stored.name)
        return Block(*encoded)

    def _encoded(self, stored: StoredParameter, start: int, stop: int) -> Encoded:
        rows = self._source.rows(stored.name, start, stop)
        known = self._importance(stored.name)
        encoded = stored.format.encode(rows, self._search, known)
        if known is None or encoded.errors is None:
            return encoded
        return Encoded(encoded.tensors, with_output_errors(encoded, rows, stored.format, known))

    def _importance(self, name: str) -> torch.Tensor | None:
        """What squared errors by a weight's inputs count for: their mean squares, where they are known."""
        return None if self._moments is None else self._moments.by_weight.get(name)

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        """Do nothing: weights are enough."""

    def prepare(self, stored: StoredParameter) -> None:
        """Do nothing: every block is encoded by itself."""

    def _as_it_is(self, stored: StoredParameter, start: int, stop: int) -> Block:
        """Rows that the source holds in the wanted format, unchanged."""
        # Zero points that all say nothing are no part of the format.
        coded = self._source.coded(stored.name, start, stop)[: len(stored.tensors)]
        tensors = {
            each.part.suffix: tensor.to(each.torch_dtype) for each, tensor in zip(stored.tensors, coded, strict=True)
        }
        for tensor in tensors.values():
            _check_finite(tensor, stored.name)
        nothing = torch.zeros(stop - start, dtype=torch.float64)
        return Block(tensors, RowErrors(nothing, nothing, nothing))

    def passed(self, stored: StoredParameter, start: int | None, block: Block) -> None:
        if stored.format.quantizes:
            self.report.expect(stored.name)
        if start is not None and block.errors is not None:
            self.report.add(stored.name, start, block.errors)

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def state(self) -> Any:
        return self.report.state()

    def restore(self, state: Any) -> None:
        self.report.restore(state)

    def files(self) -> list[Path]:
        return self._source.files()

    def small_files(self) -> dict[str, bytes]:
        return self._source.auxiliary_files() | {REPORT: (json.dumps(self.report.content(), indent=1) + "\n").encode()}


def _check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise InputError, naming it, where a floating tensor holds NaN or an infinity."""
    if tensor.is_floating_point() and tensor.itemsize > 1:  # values of float8 are finite where their scale is
        check_finite(tensor, name)


class Resharder:
    """Blocks of finished shards, as they are: values and scales don't depend on the number of chips."""

    is_slow = False

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        """Do nothing: the values are there."""

    def prepare(self, stored: StoredParameter) -> None:
        """Do nothing: the values are there."""

    def block(self, stored: StoredParameter, start: int, stop: int) -> Block:
        return Block({each.part.suffix: self._shards.rows(each.name, start, stop) for each in stored.tensors})

    def passed(self, stored: StoredParameter, start: int | None, block: Block) -> None:
        """Nothing is kept: the report comes with the shards."""

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        """Nothing was kept."""

    def files(self) -> list[Path]:
        """The chips' files and the small files, which the manifest's fingerprint does not cover."""
        directory = self._shards.directory
        names = ("config.json", MANIFEST, REPORT, *self._shards.auxiliary_files())
        return [*self._shards.paths(), *(path for name in names if (path := directory / name).is_file())]

    def small_files(self) -> dict[str, bytes]:
        report = self._shards.directory / REPORT
        if not report.is_file():
            raise InputError(f"{report} is missing. Fetch it again, or quantize the checkpoint again.")
        return self._shards.auxiliary_files() | {REPORT: report.read_bytes()}
