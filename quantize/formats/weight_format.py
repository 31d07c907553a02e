"""What a weight format is: the tensors that it stores of a weight, and how values become these tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from converters.formats.packed_integers import pack, unpack, word_count

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """One of the tensors that stand for a weight [out, in]: ``suffix`` follows the weight's name.

    Its shape is [out, in / inputs], or [out, 1] where ``inputs`` is None. So ``inputs`` is 1 for values, the group size
    for scales of groups, and None for one scale per output channel. Everything computes with elements of ``dtype``;
    files may hold several of them in a word, along ``packed_axis``. Splitting comes before packing.
    """

    suffix: str
    dtype: str  # of torch
    inputs: int | None = 1  # how many inputs one element stands for; None: all of them
    fill: float = 0.0  # what stands in padding; must decode to zeros
    packed_axis: int | None = None  # int8 elements from -8 to 7, eight in an int32
    fill_column: str | None = None  # the suffix of a column [out, 1] that stands in padding of inputs instead

    def width(self, inputs: int) -> int:
        """Its number of columns for a weight of so many ``inputs``."""
        return 1 if self.inputs is None else inputs // self.inputs

    @property
    def element(self) -> str:
        """What its elements are, as shards.json says it."""
        return self.dtype if self.packed_axis is None else "int4"

    @property
    def file_dtype(self) -> str:
        return self.dtype if self.packed_axis is None else "int32"

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in a file of a tensor of this ``shape``."""
        return tuple(word_count(size) if axis == self.packed_axis else size for axis, size in enumerate(shape))

    def to_file(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elements as a file holds them; along axis 0 only all of a file's at once."""
        return tensor if self.packed_axis is None else pack(tensor, self.packed_axis)

    def from_file(self, tensor: torch.Tensor, length: int) -> torch.Tensor:
        """Elements again, ``length`` of them along the packed axis."""
        return tensor if self.packed_axis is None else unpack(tensor, length, self.packed_axis)


class RowErrors(NamedTuple):
    """What encoding cost each row: sums over its elements and the largest difference of one; float64 [out].

    Where something is known of the inputs, also the sums of its outputs' squared errors and squares.
    """

    squared_error: torch.Tensor
    squared_weight: torch.Tensor
    max_error: torch.Tensor
    squared_output_error: torch.Tensor | None = None
    squared_output: torch.Tensor | None = None


class Encoded(NamedTuple):
    """Rows of a weight in a format: its tensors by suffix, and what that cost; None for a format that only rounds."""

    tensors: dict[str, torch.Tensor]
    errors: RowErrors | None


class WeightFormat(Protocol):
    """How weights are stored. Rows are independent of each other, so a weight may be encoded in any blocks of rows."""

    @property
    def kind(self) -> str:
        """The command line's flag: int8, int4, fp8, bf16."""
        ...

    @property
    def name(self) -> str:
        """The one name of this format: the kind, then group size and zero points: int4-g128-zp."""
        ...

    @property
    def group_size(self) -> int | None:
        """How many inputs share a scale; None: all of a row, or there is none."""
        ...

    @property
    def zero_points(self) -> bool:
        """Whether every scale has an integer with it that stands for zero."""
        ...

    @property
    def searches(self) -> bool:
        """Whether ``encode`` can look for better scales than the largest magnitude gives."""
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

    def encode(self, weight: torch.Tensor, search: bool = True, importance: torch.Tensor | None = None) -> Encoded:
        """Encode whole rows [n, in] of a floating weight; ``search`` for scales of least squared error, if it can.

        That error is weighted with ``importance`` float32 [in], not negative, by input, where there is one.

        NaN or infinity in a row must show in a floating one of the tensors.
        """
        ...

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight [n, in] that tensors [n, ...] stand for: in float32, or unchanged where nothing is quantized.

        Plain torch operations that work on any device, and on a chip's part of a weight: sizes come from shapes.
        """
        ...
