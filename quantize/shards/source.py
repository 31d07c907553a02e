"""Shards as a source of weights for llama-convert: put together again, dequantized or in their format."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.formats.compressed_tensors import SCALE_SUFFIX
from converters.formats.safetensors import TensorSpec
from converters.model.config import ModelConfig
from converters.sources.codes import SCALE, VALUES, ZERO_POINTS, Coding
from converters.sources.source import QuantizedSource, TensorSource
from quantize.formats.integers import ZERO_POINT_SUFFIX
from quantize.formats.weight_format import WeightFormat
from quantize.shards.manifest import FILE_NAME
from quantize.shards.reading import Shards
from quantize.shards.stored import quantization_fields, stored_parameters, stored_tensors

if TYPE_CHECKING:
    import torch


class ShardsSource:
    """The weights of all chips' shards under the PartsSource protocol, padding and copies of KV heads left out."""

    def __init__(self, shards: Shards) -> None:
        self.config: ModelConfig = shards.config
        self._shards = shards

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._shards.dequantized(name, start, stop)

    def default_dtype(self) -> str:
        return self.config.dtype

    def fingerprint(self) -> str:
        """Of config.json, the manifest (which has the digest of every file) and the auxiliary files."""
        directory = self._shards.directory
        digest = hashlib.sha256((directory / "config.json").read_bytes())
        digest.update((directory / FILE_NAME).read_bytes())
        for name, content in self.auxiliary_files().items():
            digest.update(name.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def files(self) -> list[Path]:
        return self._shards.paths()

    def auxiliary_files(self) -> dict[str, bytes]:
        return self._shards.auxiliary_files()

    def codings(self, config: ModelConfig) -> dict[str, Coding]:
        stored = stored_parameters(config, self._shards.scheme)
        return {each.name: _coding(each.format) for each in stored if each.format.quantizes}

    def part_rows(self, name: str, part: str, start: int, stop: int) -> torch.Tensor:
        values = self._shards.parameters[name].format.parts[0].suffix
        suffix = {VALUES: values, SCALE: SCALE_SUFFIX, ZERO_POINTS: ZERO_POINT_SUFFIX}[part]
        return self._shards.rows(name + suffix, start, stop)


class QuantizedShardsSource(ShardsSource):
    """Shards of int8, beside which some linears may be unquantized. They also give their tensors as they are: the
    QuantizedSource protocol.
    """

    format = "int8"

    def quantized_names(self, config: ModelConfig) -> set[str]:
        stored = stored_parameters(config, self._shards.manifest.scheme)
        return {each.name for each in stored if each.format.quantizes}

    def stored_specs(self, config: ModelConfig) -> list[TensorSpec]:
        return [tensor.whole_spec for tensor in stored_tensors(config, self._shards.manifest.scheme)]

    def stored_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._shards.rows(name, start, stop)

    def quantization_fields(self, config: ModelConfig) -> dict[str, Any]:
        return quantization_fields(config, self._shards.manifest.scheme)


def _coding(form: WeightFormat) -> Coding:
    return Coding(form.kind, form.group_size, form.zero_points, form.parts[1].dtype)


def open_shards(directory: Path) -> TensorSource | QuantizedSource:
    """Open the shards of a model, all chips' files of which must be there. Raises InputError for what is damaged."""
    shards = Shards(directory)
    shards.require(range(shards.chips))
    is_int8 = [each.name for each in shards.manifest.scheme.formats] == [QuantizedShardsSource.format]
    return (QuantizedShardsSource if is_int8 else ShardsSource)(shards)
