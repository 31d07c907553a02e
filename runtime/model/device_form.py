"""What of the decoder's computation a device wants in another shape or order; the results are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.model.linears.linear import MakeLinear
from runtime.model.linears.table import make_linear
from runtime.model.parts.attention import Attend, attend


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Form:
    """The parts that a device may have its own form of; by default, those that the TPU's compiler does well on."""

    make_linear: MakeLinear = make_linear
    # Rows that a matrix product is given at least, by copies: a TPU gives a single one to its vector unit, which takes
    # up to five times as long as the matrix unit for two.
    least_rows: int = 1
    attend_one: Attend = attend  # where there is one token to a row
    attend_many: Attend = attend  # where there is more than one token to a row
    materialize: Callable[[torch.Tensor], torch.Tensor] = (
        as_it_is  # for what all layers use and none should compute anew
    )
