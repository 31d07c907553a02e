"""How a source holds weights that are quantized, for targets that keep their values: see ``CodeSource``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from converters.model.config import ModelConfig
from converters.sources.source import TensorSource

if TYPE_CHECKING:
    import torch

# The tensors that stand for a weight [out, in]: (values - zero points) * scale, by groups of inputs.
VALUES, SCALE, ZERO_POINTS = "values", "scale", "zero points"


class WeightCode(NamedTuple):
    """What a weight's values are: ``name`` as llama-quantize calls it, ``kind`` int or float, and bits."""

    name: str
    kind: str
    bits: int
    group_size: int | None  # the inputs that share a scale; None: all of an output's
    zero_points: bool
    scale_dtype: str

    def groups(self, inputs: int) -> int:
        """How many scales each output has."""
        return 1 if self.group_size is None else inputs // self.group_size


@runtime_checkable
class CodeSource(TensorSource, Protocol):
    """A source that gives the values and scales of its quantized linears beside what they stand for."""

    def weight_codes(self, config: ModelConfig) -> dict[str, WeightCode]:
        """How each quantized weight is held, by name in the table's order, of this model or one with fewer layers."""
        ...

    def code_rows(self, name: str, part: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of VALUES (int8 or float8_e4m3fn [n, in]), SCALE or ZERO_POINTS (int8; [n, groups]).

        Integers of 4 bits are not packed: each is an int8 from -8 to 7.
        """
        ...
