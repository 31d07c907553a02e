"""The interface of all sources of weights: tensors by Hugging Face name, a few rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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
