"""How a source holds weights that are quantized: values, scales and zero points, beside what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from converters.model.config import ModelConfig
from converters.sources.source import TensorSource

if TYPE_CHECKING:
    import torch

# The tensors that stand for a weight [out, in]: (values - zero points) * scale, by groups of inputs.
VALUES, SCALE, ZERO_POINTS = "values", "scale", "zero points"


class Coding(NamedTuple):
    """What a source holds of a weight, in the terms of weight formats."""

    kind: str  # the integers or floating-point numbers that the values are: int8, int4 or fp8
    group_size: int | None = None  # the inputs that share a scale; None: all of an output's
    zero_points: bool = False
    scales: str = "float32"  # a dtype that holds them as they are

    @property
    def bits(self) -> int:
        return 4 if self.kind == "int4" else 8

    @property
    def is_float(self) -> bool:
        return self.kind == "fp8"

    @property
    def name(self) -> str:
        """As llama-quantize calls it: "int4-g128-zp"."""
        size = "" if self.group_size is None else f"-g{self.group_size}"
        half = "-f16" if self.scales == "float16" else ""
        return self.kind + size + ("-zp" if self.zero_points else "") + half

    def groups(self, inputs: int) -> int:
        """How many scales each output has."""
        return 1 if self.group_size is None else inputs // self.group_size


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


@runtime_checkable
class PartsSource(TensorSource, Protocol):
    """A source in which a quantized weight's tensors lie apart: who writes one after the other reads each once."""

    def codings(self, config: ModelConfig) -> dict[str, Coding]:
        """How each quantized weight is held, by name in the table's order, of this model or one with fewer layers."""
        ...

    def part_rows(self, name: str, part: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of VALUES (int8 or float8_e4m3fn [n, in]), SCALE or ZERO_POINTS (int8; [n, groups]).

        Integers of 4 bits are not packed: each is an int8 from -8 to 7.
        """
        ...
