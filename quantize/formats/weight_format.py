"""What a weight format is: the tensors that it stores of a weight, and how values become these tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """One of the tensors that stand for a weight [out, in]: ``suffix`` follows the weight's name.

    Its shape is [out, in / inputs], or [out, 1] where ``inputs`` is None. So ``inputs`` is 1 for plain values, 2 for
    values packed two to a byte, the group size for scales of groups, and None for one scale per output channel.
    """

    suffix: str
    dtype: str  # of torch
    inputs: int | None = 1  # how many inputs one element stands for; None: all of them
    fill: float = 0.0  # what stands in padding; must decode to zeros
    is_shared: bool = False  # whether chips that hold some of an element's inputs each may all have the element

    def width(self, inputs: int) -> int:
        """Its number of columns for a weight of so many ``inputs``."""
        return 1 if self.inputs is None else inputs // self.inputs


class RowErrors(NamedTuple):
    """What encoding cost each row: sums over its elements and the largest difference of one; float64 [out]."""

    squared_error: torch.Tensor
    squared_weight: torch.Tensor
    max_error: torch.Tensor


class Encoded(NamedTuple):
    """Rows of a weight in a format: its tensors by suffix, and what that cost; None for a format that only rounds."""

    tensors: dict[str, torch.Tensor]
    errors: RowErrors | None


class WeightFormat(Protocol):
    """How weights are stored. Rows are independent of each other, so a weight may be encoded in any blocks of rows."""

    @property
    def name(self) -> str:
        """As the command line and shards.json have it."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its tensors in the order of the files, the values first.

        A format that doesn't quantize has one, with the suffix "".
        """
        ...

    @property
    def quantizes(self) -> bool:
        """Whether it is for linears only; other formats take every parameter, with any number of dimensions."""
        ...

    @property
    def config_group(self) -> dict[str, Any] | None:
        """``format`` and ``weights`` of a config group of compressed-tensors; None where nothing is quantized."""
        ...

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Encode whole rows [n, in] of a floating weight.

        NaN or infinity in a row must show in a floating one of the tensors.
        """
        ...

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight [n, in] that tensors [n, ...] stand for: in float32, or unchanged where nothing is quantized.

        Plain torch operations that work on any device, and on a chip's part of a weight: sizes come from shapes.
        """
        ...
