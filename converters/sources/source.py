"""The interface of all sources of weights: tensors by Hugging Face name, a few rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from converters.model.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from converters.formats.safetensors import TensorSpec


class TensorSource(Protocol):
    """A model's weights in Hugging Face's names, shapes and RoPE row order, however they are stored.

    Names and shapes are checked against the parameter table when a source is opened; only ``rows`` reads values.
    """

    config: ModelConfig  # ``config.dtype`` is the weights' dtype; dequantized weights are float32

    def default_dtype(self) -> str:
        """The dtype to write where the user names none. May note why."""
        ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor along its first axis: [stop - start, ...] on the host.

        Raises InputError for unreadable data.
        """
        ...

    def fingerprint(self) -> str:
        """A hex digest that changes when the source's configuration or files do."""
        ...

    def files(self) -> list[Path]:
        """The files that values are read from; none where values are computed."""
        ...

    def auxiliary_files(self) -> dict[str, bytes]:
        """The files that go with the weights (tokenizer, generation settings): file name -> content."""
        ...


@runtime_checkable
class QuantizedSource(TensorSource, Protocol):
    """A source that holds linears in a quantized format, which ``rows`` dequantizes and ``stored_rows`` doesn't."""

    format: str  # as llama-quantize names it: "int8" is values and one scale for each output channel

    def quantized_names(self, config: ModelConfig) -> set[str]:
        """The names of the weights that are in that format."""
        ...

    def stored_specs(self, config: ModelConfig) -> list[TensorSpec]:
        """Every tensor as stored, for this model or one with fewer layers; a scale's name is the weight's + ``_scale``.

        Tensors that are not quantized have no scale, and are in ``config.dtype``.
        """
        ...

    def stored_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor of ``stored_specs``: [stop - start, ...] on the host."""
        ...

    def quantization_fields(self, config: ModelConfig) -> dict[str, Any]:
        """The fields of config.json that describe these tensors: ``quantization_config``."""
        ...


class Coding(NamedTuple):
    """What a source holds of a weight, in the terms of weight formats."""

    kind: str  # the integers or floating-point numbers that the values are: int8, int4 or fp8
    group_size: int | None = None  # the inputs that share a scale; None: all of an output's
    zero_points: bool = False
    scales: str = "float32"  # a dtype that holds them as they are


class Coded(NamedTuple):
    """Rows of a weight as a source holds them: (``values`` - ``zeros``) * ``scale``, by groups of inputs."""

    values: torch.Tensor  # [n, in]: int8, of 4 bits from -8 to 7; or float8_e4m3fn
    scale: torch.Tensor  # [n, groups], in the coding's dtype
    zeros: torch.Tensor | None  # int8 [n, groups], in the values' range


@runtime_checkable
class CodedSource(TensorSource, Protocol):
    """A source that another tool has quantized. Its ``rows`` are dequantized."""

    def titles(self, config: ModelConfig) -> dict[str, str]:
        """By the name of every linear that is quantized, in words, how: "GPTQ, 4 bits in groups of 128"."""
        ...

    def coding(self, name: str) -> Coding | str:
        """How ``coded`` gives a quantized linear; or in words, why it doesn't. May read its scales and zero points."""
        ...

    def coded(self, name: str, start: int, stop: int) -> Coded:
        """Rows [start, stop) of a linear that has a coding. Raises InputError for what stands for no number."""
        ...
