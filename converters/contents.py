"""What a checkpoint holds of a model: which tensors, in which order and dtype, and config.json's fields about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.exports.compressed_tensors import CompressedExport
from converters.exports.gguf import GGUFExport
from converters.files.row_blocks import row_blocks
from converters.formats.finite import check_finite
from converters.formats.safetensors import CODES, DTYPE_NAMES, TensorSpec
from converters.model.config import ModelConfig
from converters.model.parameters import parameters
from converters.sources.source import QuantizedSource, TensorSource

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint in the order of its files.

    ``rows(name, start, stop)`` reads rows [start, stop) of one. ``fields`` are what config.json has besides the model's
    dimensions.
    """

    config: ModelConfig
    specs: tuple[TensorSpec, ...]
    rows: Callable[[str, int, int], torch.Tensor]
    fields: dict[str, Any]


class Block(NamedTuple):
    """The rows of a tensor up to row ``stop``, in the dtype to write."""

    spec: TensorSpec
    stop: int
    values: torch.Tensor


def floating_contents(source: TensorSource, config: ModelConfig) -> Contents:
    """Every parameter in ``config.dtype``."""
    code = CODES[config.dtype]
    specs = tuple(TensorSpec(parameter.name, code, parameter.shape) for parameter in parameters(config))
    return Contents(config, specs, source.rows, {})


def quantized_contents(source: QuantizedSource, config: ModelConfig) -> Contents:
    """The quantized tensors of the source as they are, and the other parameters in ``config.dtype``."""
    return Contents(config, tuple(source.stored_specs(config)), source.stored_rows, source.quantization_fields(config))


def compressed_contents(export: CompressedExport) -> Contents:
    """A source's quantized weights in the compressed-tensors layout, and the other parameters in ``config.dtype``."""
    return Contents(export.config, export.specs, export.rows, export.fields)


def gguf_contents(export: GGUFExport) -> Contents:
    """The tensors of a GGUF file, as they are written there."""
    return Contents(export.config, export.file.specs, export.rows, {})


def block_tasks(contents: Contents, wanted: Iterable[TensorSpec]) -> Iterator[Callable[[], Block]]:
    """Tasks that read the blocks of these tensors in order.

    A task raises InputError for values that can't be read or are not finite.
    """
    for spec in wanted:
        for start, stop in row_blocks(0, spec.shape[0], prod(spec.shape[1:])):
            yield partial(_read, contents, spec, start, stop)


def _read(contents: Contents, spec: TensorSpec, start: int, stop: int) -> Block:
    import torch

    values = contents.rows(spec.name, start, stop).to(getattr(torch, DTYPE_NAMES[spec.code]))
    if values.is_floating_point():
        check_finite(values if values.itemsize > 1 else values.float(), spec.name)
    return Block(spec, stop, values)
