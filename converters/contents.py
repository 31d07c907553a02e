"""How a checkpoint holds a model: which tensors, in which order and dtype, and what config.json says of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError
from converters.files.row_blocks import row_blocks
from converters.formats.safetensors import CODES, DTYPE_NAMES, TensorSpec
from converters.model.config import ModelConfig
from converters.model.parameters import parameters
from converters.sources.source import Int8Source, TensorSource

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Form:
    """The tensors of a checkpoint in the order of its files, and ``rows``, which reads some rows of one.

    ``fields`` are those that config.json has beside the model's dimensions.
    """

    config: ModelConfig
    specs: tuple[TensorSpec, ...]
    rows: Callable[[str, int, int], torch.Tensor]
    fields: dict[str, Any]


def floating_form(source: TensorSource, config: ModelConfig) -> Form:
    """Every parameter in ``config.dtype``."""
    code = CODES[config.dtype]
    specs = tuple(TensorSpec(parameter.name, code, parameter.shape) for parameter in parameters(config))
    return Form(config, specs, source.rows, {})


def int8_form(source: Int8Source, config: ModelConfig) -> Form:
    """The int8 values and scales as the source has them, and the other parameters in ``config.dtype``."""
    return Form(config, tuple(source.stored_specs(config)), source.stored_rows, source.quantization_fields(config))


def block_tasks(form: Form, wanted: tuple[TensorSpec, ...]) -> Iterator[Callable[[], tuple[TensorSpec, int, Any]]]:
    """Tasks that read the blocks of these tensors in order: each gives the row at which it stops, and the block."""
    for spec in wanted:
        for start, stop in row_blocks(0, spec.shape[0], prod(spec.shape[1:])):
            yield partial(_read, form, spec, start, stop)


def _read(form: Form, spec: TensorSpec, start: int, stop: int) -> tuple[TensorSpec, int, torch.Tensor]:
    import torch

    block = form.rows(spec.name, start, stop).to(getattr(torch, DTYPE_NAMES[spec.code]))
    if block.is_floating_point():
        check_finite(block, spec.name)
    return spec, stop, block


def check_finite(block: torch.Tensor, name: str) -> None:
    """Raise InputError, naming the tensor, where a block of weights holds NaN or an infinity."""
    if block.abs().amax().isfinite():  # several times as fast as isfinite of every value
        return
    if str(block.dtype) == "torch.float16":
        raise InputError(
            f"The tensor {name} holds NaN, or values that are infinite or too large for float16. Convert it with "
            "--dtype bfloat16, or give another source."
        )
    raise InputError(f"The tensor {name} holds NaN or infinite values. Fetch the source again, or give another.")
