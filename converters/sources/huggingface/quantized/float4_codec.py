"""Weights in 4-bit floating point (e2m1), two to a byte, the first in its lower half: NVFP4 and MXFP4.

A scale counts for a group of inputs. NVFP4's is e4m3, divided by one number for the whole tensor; MXFP4's is a power of
two, whose exponent is stored with 127 added (OCP Microscaling Formats, E8M0), where 255 is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from converters.console.errors import InputError
from converters.sources.huggingface.quantized.codec import OnlyRows, by_input

if TYPE_CHECKING:
    import torch

    from converters.sources.huggingface.surplus import Held

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower three bits; the fourth is the sign
_BIAS, _NAN = 127, 255


@dataclass
class Float4Codec(OnlyRows):
    """Values uint8 [out, in / 2] times scales [out, in / group]: see ``Codec``."""

    name: str
    shape: tuple[int, int]
    packed: Held = field(repr=False)
    scales: Held = field(repr=False)
    divisor: Held | None = field(repr=False)  # of all scales; None: these are exponents
    group: int = 0

    why = "no format here has 4-bit floating-point values"

    @property
    def title(self) -> str:
        return f"{'MXFP4' if self.divisor is None else 'NVFP4'}, groups of {self.group}"

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        packed = self.packed.rows(start, stop)
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)  # [n, in]
        values = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)])[codes.int()]
        return values.mul_(by_input(self._scale(start, stop), self.shape[1], self.group))

    def _scale(self, start: int, stop: int) -> torch.Tensor:
        """float32 [n, groups]."""
        import torch

        stored = self.scales.rows(start, stop)
        if self.divisor is not None:
            return stored.float() / self.divisor.whole()
        if (stored == _NAN).any():
            raise InputError(f"{self.scales.path}: the tensor {self.scales.name} holds NaN. Fetch the source again.")
        return torch.exp2(stored.double() - _BIAS).float()
