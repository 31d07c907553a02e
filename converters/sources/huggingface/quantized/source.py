"""A Hugging Face directory whose linears another tool has quantized, as a source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError, UnexpectedTensor
from converters.console.notes import note
from converters.formats.compressed_tensors import INT8_GROUP, SCALE_SUFFIX, quantization_config
from converters.formats.safetensors import CODES, TensorSpec
from converters.model.config import ModelConfig
from converters.model.parameters import Parameter, parameters
from converters.sources.codes import Coded, Coding
from converters.sources.huggingface.plain_source import HFSource
from converters.sources.huggingface.quantized.codec import Codec, Method
from converters.sources.huggingface.quantized.stripes import Stripes
from converters.sources.huggingface.surplus import Held

if TYPE_CHECKING:
    import torch


class QuantizedHFSource(HFSource):
    """Weights as ``codecs`` store them, beside others as they are, under the CodedSource protocol."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        holder: dict[str, Held],
        dtypes: tuple[set[str], str | None],
        method: Method,
        codecs: Mapping[str, Codec],
    ) -> None:
        super().__init__(directory, config, holder, *dtypes)
        self._method, self._codecs = method, codecs

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        codec = self._codecs.get(name)
        return super().rows(name, start, stop) if codec is None else codec.rows(start, stop)

    def fingerprint(self) -> str:
        settings = json.dumps(self._method.fields, sort_keys=True)
        return hashlib.sha256(f"{super().fingerprint()} {settings}".encode()).hexdigest()

    def titles(self, config: ModelConfig) -> dict[str, str]:
        linears = (each.name for each in parameters(config) if each.row.is_linear)
        return {name: f"{self._method.title}, {self._codecs[name].title}" for name in linears if name in self._codecs}

    def coding(self, name: str) -> Coding | str:
        return self._codecs[name].coding()

    def coded(self, name: str, start: int, stop: int) -> Coded:
        return self._codecs[name].coded(start, stop)


class Int8HFSource(QuantizedHFSource):
    """Weights that are all int8 with a scale for each output, under the QuantizedSource protocol too."""

    format = "int8"

    def quantized_names(self, config: ModelConfig) -> set[str]:
        return set(self.titles(config))

    def stored_specs(self, config: ModelConfig) -> list[TensorSpec]:
        specs, quantized = [], self.quantized_names(config)
        for parameter in parameters(config):
            is_int8 = parameter.name in quantized
            specs.append(TensorSpec(parameter.name, CODES["int8" if is_int8 else config.dtype], parameter.shape))
            if is_int8:
                specs.append(TensorSpec(parameter.name + SCALE_SUFFIX, CODES["float32"], (parameter.shape[0], 1)))
        return specs

    def stored_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        linears = self.quantized_names(self.config)
        if name in linears:
            return self.coded(name, start, stop).values
        if name.removesuffix(SCALE_SUFFIX) in linears:
            return self.coded(name.removesuffix(SCALE_SUFFIX), start, stop).scale
        return self.rows(name, start, stop)

    def quantization_fields(self, config: ModelConfig) -> dict[str, Any]:
        return {"quantization_config": quantization_config(config, [(INT8_GROUP, self.quantized_names(config))])}


def quantized_source(
    directory: Path,
    config: ModelConfig,
    method: Method,
    holder: dict[str, Held],
    parts: dict[str, dict[str, Held]],
    dtypes: tuple[set[str], str | None],
) -> HFSource:
    """The source of a directory with ``parts`` of quantized weights by name, beside ``holder`` of others.

    ``dtypes`` are those of the others, and what config.json says. Raises InputError for tensors that are not what the
    method has, and UnexpectedTensor for those of a weight that is none of a linear or a table.
    """
    stripes, codecs = Stripes(), {}
    for parameter in parameters(config):
        if parameter.name in parts:
            tensors = parts[parameter.name]
            if len(parameter.shape) != 2:
                raise UnexpectedTensor(
                    f"{directory} holds {', '.join(sorted(tensors))} of {parameter.name}, which is no matrix."
                )
            codecs[parameter.name] = method.codec(parameter, tensors, stripes)
    if not any(parameter.name in codecs for parameter in parameters(config) if parameter.row.is_linear):
        raise InputError(
            f"{directory} holds no quantized linear, though its config.json says that they are quantized by "
            f"{method.title}. Take quantization_config out of it if the weights are whole, or fetch those it is about."
        )
    source = Int8HFSource if all(codec.is_plain_int8 for codec in codecs.values()) else QuantizedHFSource
    _note_layers(method, parameters(config), codecs, str(directory))
    return source(directory, config, holder | _first_parts(parts), dtypes, method, codecs)


def _first_parts(parts: dict[str, dict[str, Held]]) -> dict[str, Held]:
    """Every tensor of quantized weights, by a name of its own."""
    return {f"{weight}: {part}": held for weight, tensors in parts.items() for part, held in tensors.items()}


def _note_layers(method: Method, found: list[Parameter], codecs: Mapping[str, Codec], where: str) -> None:
    """Note what is quantized but no linear, and which linears are stored otherwise than config.json says."""
    whole: list[str] = []
    for parameter in found:
        name = parameter.name
        if not parameter.row.is_linear:
            if name in codecs:
                note(f"{where} holds {name} in {codecs[name].title}. It is dequantized: only linears are kept so.")
            continue
        left = method.leaves(name.removesuffix(".weight"))
        if left and name in codecs:
            note(f"{where}: config.json has {name} in {method.exceptions}, but it is quantized and read as such.")
        elif not left and name not in codecs:
            whole.append(name)
    if whole:
        more = len(whole) - 1
        are, them = (f" and {more} more are", "them") if more else (" is", "it")
        note(f"{where}: {whole[0]}{are} not quantized, though config.json doesn't have {them} in {method.exceptions}.")
