"""Weights in 8-bit floating point (e4m3) with scales of the tensor, of outputs, of groups of inputs or of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from converters.console.errors import InputError
from converters.files.row_blocks import row_blocks
from converters.sources.codes import Coded, Coding
from converters.sources.huggingface.quantized.codec import by_input, kept_scales

if TYPE_CHECKING:
    import torch

    from converters.sources.huggingface.surplus import Held

_MAGNITUDE, _NAN = 127, 127  # of a byte: the bits but the sign, and their only pattern that is no number


@dataclass
class Float8Codec:
    """Values float8_e4m3fn [out, in] times a scale: see ``Codec``.

    The scale is one number, or [out, 1]; [out, in / ``group``] of groups; or of every ``block`` of so many outputs and
    inputs, of which the last may be smaller.
    """

    name: str
    shape: tuple[int, int]
    weight: Held = field(repr=False)
    scales: Held = field(repr=False)
    group: int | None = None
    block: tuple[int, int] | None = None

    is_plain_int8 = False

    @property
    def title(self) -> str:
        if self.block is not None:
            return f"e4m3, blocks of {self.block[0]} x {self.block[1]}"
        if self.group is not None:
            return f"e4m3, groups of {self.group}"
        return "e4m3, a scale for each output" if len(self.scales.shape) == 2 else "e4m3, one scale"

    def rows(self, start: int, stop: int) -> torch.Tensor:
        values = self._values(start, stop).float()
        return values.mul_(by_input(self._scale(start, stop).float(), self.shape[1], self._inputs))

    def coding(self) -> Coding | str:
        inputs = self._inputs
        if inputs is not None and self.shape[1] % inputs:
            return f"its {self.shape[1]} inputs are no multiple of {inputs}"
        scales = kept_scales(inputs, self.scales.dtype, self._all_scales)
        if scales is None:
            return "neither bfloat16 nor float16 holds its scales, which are float32"
        return Coding("fp8", inputs, False, scales)

    def coded(self, start: int, stop: int) -> Coded:
        return Coded(self._values(start, stop), self._scale(start, stop), None)

    @property
    def _inputs(self) -> int | None:
        """The inputs that share a scale; None for all of them."""
        inputs = self.group if self.block is None else self.block[1]
        return None if inputs is None or inputs >= self.shape[1] else inputs

    def _values(self, start: int, stop: int) -> torch.Tensor:
        import torch

        values = self.weight.rows(start, stop)
        if ((values.view(torch.uint8) & _MAGNITUDE) == _NAN).any():
            raise InputError(f"{self.weight.path}: the tensor {self.weight.name} holds NaN. Fetch the source again.")
        return values

    def _scale(self, start: int, stop: int) -> torch.Tensor:
        """[n, groups], as stored."""
        import torch

        if self.block is not None:
            first = start // self.block[0]
            scales = self.scales.rows(first, (stop - 1) // self.block[0] + 1)
            return scales[torch.arange(start, stop) // self.block[0] - first]
        if len(self.scales.shape) == 2:
            return self.scales.rows(start, stop)
        return self.scales.whole().expand(stop - start, 1)

    def _all_scales(self) -> Iterator[torch.Tensor]:
        rows, columns = self.scales.shape
        for block in row_blocks(0, rows, columns):
            yield self.scales.rows(*block)
