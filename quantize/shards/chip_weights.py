"""What a device loads a model from: shards, or a source of weights that is split over the chips as it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

from converters.model.config import ModelConfig
from converters.sources.codes import CodedSource
from converters.sources.source import QuantizedSource, TensorSource
from quantize.formats.floating import Floating
from quantize.formats.weight_format import WeightFormat
from quantize.shards.partition import Segment
from quantize.shards.scheme import Scheme
from quantize.shards.stored import StoredTensor, stored_tensors

if TYPE_CHECKING:
    import torch


class ChipWeights(Protocol):
    """A model's tensors, whole or by chip. ``Shards`` are this, and ``SplitSource``."""

    config: ModelConfig

    @property
    def chips(self) -> int: ...

    @property
    def scheme(self) -> Scheme: ...

    def check(self, chips: Iterable[int]) -> None:
        """Raise InputError where what one of these chips needs is not there, before any tensor is read."""
        ...

    def local(self, name: str, chip: int) -> torch.Tensor:
        """The part of a tensor that ``chip`` holds, padding included, in elements."""
        ...

    def local_blocks(self, name: str, chip: int, nbytes: int) -> Iterator[torch.Tensor]:
        """``local``, some rows after the other, of about ``nbytes`` together."""
        ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor as it was before the split, in elements."""
        ...


@dataclass(frozen=True)
class Unquantized(Scheme):
    """Every parameter in the dtype ``default``, one of torch's floating ones."""

    @property
    def default_format(self) -> WeightFormat:
        return Floating(self.default)


class SplitSource:
    """A source's weights as the shards for ``chips`` chips would hold them, in the source's own dtype and in no file.

    Of a weight that is split by its inputs every chip takes part of every row: the last such tensor is kept whole, so
    that it is read once for all chips. Nothing else is kept.
    """

    def __init__(self, source: TensorSource, chips: int) -> None:
        dequantizes = isinstance(source, QuantizedSource | CodedSource)
        dtype = "float32" if dequantizes else source.config.dtype
        self.config, self.chips, self.scheme = source.config.with_dtype(dtype), chips, Unquantized(dtype)
        self._source = source
        self._tensors = {tensor.name: tensor for tensor in stored_tensors(self.config, self.scheme)}
        self._kept: tuple[str, torch.Tensor] | None = None

    def check(self, chips: Iterable[int]) -> None:
        """Do nothing: a source is checked when it is opened."""

    def local(self, name: str, chip: int) -> torch.Tensor:
        import torch

        return torch.cat(list(self._pieces(name, chip, self._tensors[name].shape[0])))

    def local_blocks(self, name: str, chip: int, nbytes: int) -> Iterator[torch.Tensor]:
        tensor = self._tensors[name]
        width = prod(tensor.local_shape(self.config, self.chips)[1:])
        yield from self._pieces(name, chip, max(1, nbytes // max(1, width * tensor.torch_dtype.itemsize)))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._source.rows(name, start, stop).to(self._tensors[name].torch_dtype)

    def _pieces(self, name: str, chip: int, most: int) -> Iterator[torch.Tensor]:
        """A chip's part of a tensor, up to ``most`` rows at a time."""
        import torch

        tensor = self._tensors[name]
        count = tensor.shape[0]
        if tensor.shard == 1:
            whole, segments = self._whole(tensor), tensor.split(self.config, self.chips).segments[chip]
            for start, stop in _blocks(count, most):
                yield torch.cat([_columns(whole[start:stop], segment) for segment in segments], dim=1)
            return
        segments = (Segment(0, count),)
        if tensor.shard == 0:
            segments = tensor.split(self.config, self.chips).segments[chip]
        for segment in segments:
            for start, stop in _blocks(segment.length, most):
                padding = segment.start is None
                at = segment.start or 0
                yield tensor.fill_rows(stop - start) if padding else self.rows(name, at + start, at + stop)

    def _whole(self, tensor: StoredTensor) -> torch.Tensor:
        if self._kept is None or self._kept[0] != tensor.name:
            self._kept = None  # before the next is read
            self._kept = tensor.name, self.rows(tensor.name, 0, tensor.shape[0])
        return self._kept[1]


def _columns(rows: torch.Tensor, segment: Segment) -> torch.Tensor:
    if segment.start is None:
        return rows.new_zeros(len(rows), segment.length)
    return rows[:, segment.start : segment.start + segment.length]


def _blocks(count: int, most: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, most):
        yield start, min(start + most, count)
