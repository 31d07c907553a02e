"""Integers of 8 or 4 bits with a scale per output channel or per group of inputs, symmetric or with zero points.

The layouts are those of compressed-tensors: "int-quantized" for 8 bits, "pack-quantized" for 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError
from converters.formats.compressed_tensors import SCALE_SUFFIX, weights_group
from quantize.formats.int8 import quantize_rows
from quantize.formats.scales import quantize_groups
from quantize.formats.weight_format import Encoded, Part

if TYPE_CHECKING:
    import torch

ZERO_POINT_SUFFIX = "_zero_point"
GROUP_SCALES = "bfloat16"  # of what is quantized here; others are only kept as they are found


@dataclass(frozen=True)
class Integers:
    """Values int8 [out, in] times their scale, which counts for ``group_size`` inputs or, with None, for all.

    Scales of groups are bfloat16 [out, in / group_size], or float16 if ``scales`` says so, those of channels float32
    [out, 1]. A zero point, of the scale's shape, is subtracted from the values before.
    """

    bits: int
    group_size: int | None = None
    zero_points: bool = False
    scales: str = GROUP_SCALES
    quantizes = True

    @property
    def kind(self) -> str:
        return f"int{self.bits}"

    @property
    def name(self) -> str:
        groups = "" if self.group_size is None else f"-g{self.group_size}"
        half = "" if self.scales == GROUP_SCALES else "-f16"
        return self.kind + groups + ("-zp" if self.zero_points else "") + half

    @property
    def searches(self) -> bool:
        """Only 4 bits gain by it: with 8, the scale by the largest magnitude costs 3% more than the best at most."""
        return self.bits == 4

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        packed = self.bits == 4
        scale_dtype = "float32" if self.group_size is None else self.scales
        # A whole row's zero point counts in its padding too.
        fill = ZERO_POINT_SUFFIX if self.zero_points and self.group_size is None else None
        values = Part("_packed" if packed else "", "int8", fill_column=fill, packed_axis=1 if packed else None)
        scale = Part(SCALE_SUFFIX, scale_dtype, self.group_size, fill=1.0)
        if not self.zero_points:
            return values, scale
        return values, scale, Part(ZERO_POINT_SUFFIX, "int8", self.group_size, packed_axis=0 if packed else None)

    @property
    def config_group(self) -> dict[str, Any]:
        return weights_group(
            "pack-quantized" if self.bits == 4 else "int-quantized", "int", self.bits, self.group_size, self.zero_points
        )

    def encode(self, weight: torch.Tensor, search: bool = True, importance: torch.Tensor | None = None) -> Encoded:
        if self.name == "int8":
            quantized, errors = quantize_rows(weight)
        else:
            quantized, errors = quantize_groups(
                weight, self.group_size, self.bits, zero_points=self.zero_points, search=search, importance=importance
            )
        if self.scales != GROUP_SCALES:
            quantized = (quantized.values, self._narrowed(quantized.scale), *quantized[2:])
        # Without zero points the last of three tensors is None.
        return Encoded(self._named(quantized), errors)

    def _narrowed(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales of groups in the dtype that they are stored in. Raises InputError where they are out of its range."""
        import torch

        narrow = scale.to(getattr(torch, self.scales))
        if ((narrow.float() != scale.float()) & scale.isfinite()).any():
            raise InputError(
                f"A weight has scales that {self.scales} doesn't hold. Give another format than {self.name}."
            )
        return narrow

    def stored(self, values: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that stand for integers int8 [n, in] with a scale and a zero point [n, groups] each, in float32.

        The scale must be one that the stored dtype can hold; zero points count only where the format has them.
        """
        import torch

        return self._named((values, scale.to(getattr(torch, self.parts[1].dtype)), zeros.to(torch.int8)))

    def _named(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values, scale and, where the format has them, zero points, by suffix."""
        return {part.suffix: tensor for part, tensor in zip(self.parts, tensors[: len(self.parts)], strict=True)}

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values, scale = tensors[self.parts[0].suffix], tensors[SCALE_SUFFIX]
        groups = values.unflatten(1, (scale.shape[1], -1)).float()  # [n, groups, group]
        if self.zero_points:
            groups = groups - tensors[ZERO_POINT_SUFFIX].float()[:, :, None]
        return (groups * scale.float()[:, :, None]).flatten(1)
