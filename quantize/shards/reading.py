"""A finished directory of shards: checked on opening, read per chip or put back together, verified by digest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from converters.console.errors import InputError, MissingTensor, UnexpectedTensor
from converters.console.progress import Advance
from converters.formats.packed_integers import PER_WORD, word_count
from converters.formats.tensor_files import SafetensorsFile
from converters.model.config import ModelConfig
from converters.model.families.hf_config import read_config
from converters.output.record import WRITTEN, read_record, verify_files
from converters.output.state import check_finished
from converters.tokenizers.auxiliary_files import read_auxiliary_files
from quantize.shards.manifest import FILE_NAME, Manifest, chip_file, read_manifest
from quantize.shards.partition import Split
from quantize.shards.stored import Scheme, StoredParameter, StoredTensor, chip_specs, stored_parameters

if TYPE_CHECKING:
    import torch


class Shards:
    """The shards of a model. Opening reads the manifest; a chip's file is opened and checked when first needed."""

    def __init__(self, directory: Path) -> None:
        check_finished(directory, "llama-quantize", FILE_NAME)
        if not (directory / FILE_NAME).exists():
            raise InputError(f"{directory} has no {FILE_NAME}: it is no finished output of llama-quantize.")
        self.directory = directory
        self.config: ModelConfig = read_config(directory / "config.json", quantized=True)
        self.manifest: Manifest = read_manifest(directory, self.config)
        stored = stored_parameters(self.config, self.manifest.scheme)
        self.parameters: dict[str, StoredParameter] = {each.name: each for each in stored}
        self.tensors: dict[str, StoredTensor] = {tensor.name: tensor for each in stored for tensor in each.tensors}
        self._files: dict[int, SafetensorsFile] = {}

    @property
    def chips(self) -> int:
        return self.manifest.chips

    @property
    def scheme(self) -> Scheme:
        return self.manifest.scheme

    def require(self, chips: Iterable[int]) -> None:
        """Raise InputError, naming them, where some of these chips' files are not there."""
        missing = [chip for chip in chips if not self._path(chip).is_file()]
        if missing:
            names = ", ".join(chip_file(chip, self.chips) for chip in missing[:8])
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise InputError(f"{self.directory} lacks {names}{more}. Fetch them, or write them with llama-quantize.")

    def check(self, chips: Iterable[int]) -> None:
        """Raise InputError where one of these chips' files is not there, or isn't what the manifest and config.json
        say by its size and the tensors' names and shapes.
        """
        chips = list(chips)
        self.require(chips)
        for chip in chips:
            self._open(chip)

    def paths(self) -> list[Path]:
        """The chips' files that the manifest lists."""
        return [self._path(chip) for chip in sorted(self.manifest.files)]

    def local(self, name: str, chip: int) -> torch.Tensor:
        """The part of a tensor that ``chip`` holds, padding included, in elements."""
        return self._local_rows(name, chip, 0, self._local_shape(name)[0])

    def local_blocks(self, name: str, chip: int, nbytes: int) -> Iterator[torch.Tensor]:
        """``local``, some rows after the other, of about ``nbytes`` together."""
        count, *others = self._local_shape(name)
        rows = max(1, nbytes // max(1, prod(others) * self.tensors[name].torch_dtype.itemsize))
        for start in range(0, count, rows):
            yield self._local_rows(name, chip, start, min(start + rows, count))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor as it was before the split, in elements."""
        import torch

        tensor = self.tensors[name]
        if tensor.shard is None:
            return self._local_rows(name, 0, start, stop)
        split = tensor.split(self.config, self.chips)
        if tensor.shard == 0:
            return torch.cat(self._row_pieces(name, split, start, stop))
        return torch.cat(self._column_pieces(name, split, start, stop), dim=1)[:, :: split.repeat]

    def dequantized(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a parameter before the split: float32 where it is quantized, else as it is stored."""
        parameter = self.parameters[name]
        return parameter.decode({each.name: self.rows(each.name, start, stop) for each in parameter.tensors})

    def verify(self, advance: Advance) -> None:
        """Read every file that the manifest or the record lists; raise InputError, naming it, where a byte differs."""
        self.require(self.manifest.files)
        for chip in sorted(self.manifest.files):
            self._open(chip)
        files = {chip_file(chip, self.chips): record for chip, record in sorted(self.manifest.files.items())}
        if (self.directory / WRITTEN).is_file():
            files = read_record(self.directory / WRITTEN).files | files
        verify_files(self.directory, files, "llama-quantize", advance)

    def auxiliary_files(self) -> dict[str, bytes]:
        """The tokenizer's files and the like: file name -> content."""
        return read_auxiliary_files(self.directory)

    def _path(self, chip: int) -> Path:
        return self.directory / chip_file(chip, self.chips)

    def _open(self, chip: int) -> SafetensorsFile:
        if chip not in self._files:
            self.require([chip])
            self._check_size(chip)
            file = SafetensorsFile(self._path(chip))
            self._check_tensors(file)
            self._files[chip] = file
        return self._files[chip]

    def _check_size(self, chip: int) -> None:
        path, record = self._path(chip), self.manifest.files.get(chip)
        if record is None:
            raise InputError(f"{path} is not listed in {FILE_NAME}; it belongs to another output.")
        size = path.stat().st_size
        if size != record.nbytes:
            raise InputError(
                f"{path} is {size} bytes long; {FILE_NAME} says {record.nbytes}. Fetch it again, or write it "
                "with llama-quantize --force."
            )

    def _check_tensors(self, file: SafetensorsFile) -> None:
        """Check a chip's tensors against those that every chip has to hold."""
        specs = {spec.name: spec for spec in chip_specs(self.config, self.manifest.scheme, self.chips)}
        names = set(file.names())
        for name in names - specs.keys():
            raise UnexpectedTensor(f"{file.path} holds the tensor {name}, which this model's shards don't have.")
        for name, spec in specs.items():
            if name not in names:
                raise MissingTensor(f"{file.path} lacks the tensor {name}.")
            if (file.code(name), file.shape(name)) != (spec.code, spec.shape):
                raise InputError(
                    f"{file.path}: the tensor {name} is {file.code(name)} {list(file.shape(name))}, but one of "
                    f"{self.chips} chips holds {spec.code} {list(spec.shape)}. It belongs to another output."
                )

    def _local_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].local_shape(self.config, self.chips)

    def _local_rows(self, name: str, chip: int, start: int, stop: int) -> torch.Tensor:
        """Rows of the part that a chip holds, in elements."""
        part, file = self.tensors[name].part, self._open(chip)
        if part.packed_axis != 0:
            return part.from_file(file.rows(name, start, stop), self._local_shape(name)[-1])
        first, last = start // PER_WORD, word_count(stop)
        found = part.from_file(file.rows(name, first, last), (last - first) * PER_WORD)
        return found[start - first * PER_WORD : stop - first * PER_WORD]

    def _row_pieces(self, name: str, split: Split, start: int, stop: int) -> list[torch.Tensor]:
        pieces = []
        at = start
        for chip, segments in enumerate(split.segments):
            offset = 0
            for segment in segments:
                if segment.start is not None and segment.start <= at < min(stop, segment.start + segment.length):
                    end = min(stop, segment.start + segment.length)
                    first = offset + at - segment.start
                    pieces.append(self._local_rows(name, chip, first, first + end - at))
                    at = end
                offset += segment.length
        return pieces

    def _column_pieces(self, name: str, split: Split, start: int, stop: int) -> list[torch.Tensor]:
        pieces = []
        for chip, segments in enumerate(split.segments):
            local = self._local_rows(name, chip, start, stop)
            offset = 0
            for segment in segments:
                if segment.start is not None:
                    pieces.append(local[:, offset : offset + segment.length])
                offset += segment.length
        return pieces
