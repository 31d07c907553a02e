"""What every source of weights offers: tensors by Hugging Face name, a few rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from converters.model.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from converters.formats.safetensors import TensorSpec


class TensorSource(Protocol):
    """A model's weights in Hugging Face names, shapes and RoPE row order, whatever they are stored as.

    Opening a source checks its names and shapes against the parameter table; values are read by ``rows`` alone.
    """

    config: ModelConfig  # ``config.dtype`` is that of the weights; what is dequantized comes as float32

    def default_dtype(self) -> str:
        """The dtype to write where the user names none: that of the weights. May note why."""
        ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor along its first axis, on the host. Raises InputError for unreadable data."""
        ...

    def fingerprint(self) -> str:
        """A hex digest that changes when the source's configuration or files do."""
        ...

    def files(self) -> list[Path]:
        """The files that values are read from; none for values that are made."""
        ...

    def auxiliary_files(self) -> dict[str, bytes]:
        """The files that go with the weights (tokenizer, generation settings): file name -> content."""
        ...


@runtime_checkable
class Int8Source(TensorSource, Protocol):
    """A source that holds linears as int8 values and scales: ``rows`` dequantizes, ``stored_rows`` doesn't."""

    def stored_specs(self, config: ModelConfig) -> list[TensorSpec]:
        """Every tensor as it is held, scales by the weight's name and ``_scale``, for this model or a cut of it.

        Tensors that are not quantized, and have no scale, are in ``config.dtype``.
        """
        ...

    def stored_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of such a tensor, on the host."""
        ...

    def quantization_fields(self, config: ModelConfig) -> dict[str, Any]:
        """What config.json has to say of these tensors: its ``quantization_config``."""
        ...
