"""Weights as they are, in a floating dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantize.formats.weight_format import Encoded, Part

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Floating:
    """Every value in ``dtype``, a floating dtype of torch."""

    dtype: str
    quantizes = False
    searches = False
    zero_points = False
    group_size = None
    config_group = None

    @property
    def kind(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(self.dtype, self.dtype)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("", self.dtype),)

    def encode(self, weight: torch.Tensor, search: bool = True, importance: torch.Tensor | None = None) -> Encoded:
        """Rows [n, ...] of a parameter with any number of dimensions; ``search`` changes nothing."""
        import torch

        return Encoded({"": weight.to(getattr(torch, self.dtype))}, None)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return tensors[""]
