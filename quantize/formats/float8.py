"""8-bit floating-point values (e4m3) with a scale per output channel or group (compressed-tensors: "float-quantized").

e4m3 in the variant without infinities (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"): up to 448.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from converters.files.row_blocks import CACHED_ELEMENTS, row_blocks
from converters.formats.compressed_tensors import SCALE_SUFFIX, weights_group
from quantize.formats.weight_format import Encoded, Part, RowErrors

if TYPE_CHECKING:
    import torch

LARGEST = 448.0
_SMALLEST_SCALE = 2.0**-126  # of the normal numbers


@dataclass(frozen=True)
class Float8:
    """Values float8_e4m3fn [out, in]; scales float32 [out, 1], or bfloat16 [out, in / group_size] of groups."""

    group_size: int | None = None
    kind = "fp8"
    quantizes = True
    zero_points = False
    searches = False  # floating-point steps grow with the value: another scale moves the error, and hardly lowers it

    @property
    def name(self) -> str:
        return self.kind if self.group_size is None else f"{self.kind}-g{self.group_size}"

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        scale_dtype = "float32" if self.group_size is None else "bfloat16"
        return Part("", "float8_e4m3fn"), Part(SCALE_SUFFIX, scale_dtype, self.group_size, fill=1.0)

    @property
    def config_group(self) -> dict[str, Any]:
        return weights_group("float-quantized", "float", 8, self.group_size, zero_points=False)

    def encode(self, weight: torch.Tensor, search: bool = True, importance: torch.Tensor | None = None) -> Encoded:
        """A group's largest magnitude becomes 448; neither ``search`` nor ``importance`` changes anything."""
        import torch

        rows, width = weight.shape
        group = self.group_size or width
        values = torch.empty(rows, width, dtype=torch.float8_e4m3fn)
        scales = torch.empty(rows, width // group, dtype=getattr(torch, self.parts[1].dtype))
        errors = RowErrors(*(torch.empty(rows, dtype=torch.float64) for _ in range(3)))
        for start, stop in row_blocks(0, rows, width, CACHED_ELEMENTS):
            block = weight[start:stop].float().unflatten(1, (-1, group))  # [n, groups, group]
            scale = (block.abs().amax(2) / LARGEST).to(scales.dtype)
            scale[scale < _SMALLEST_SCALE] = 1.0
            unit = scale.float()[:, :, None]
            encoded = (block / unit).clamp_(-LARGEST, LARGEST).to(values.dtype)  # it would make NaN of larger ones
            values[start:stop], scales[start:stop] = encoded.flatten(1), scale
            difference = (encoded.float() * unit).sub_(block).flatten(1).double()
            errors.max_error[start:stop] = difference.abs().amax(1)
            errors.squared_error[start:stop] = difference.square_().sum(1)
            errors.squared_weight[start:stop] = block.flatten(1).double().square_().sum(1)
        return Encoded({"": values, SCALE_SUFFIX: scales}, errors)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values, scale = tensors[""].float(), tensors[SCALE_SUFFIX].float()
        return (values.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)
