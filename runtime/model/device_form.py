"""The parts of the decoder's computation that a device may run in another shape or order, with the same results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.model.linears.linear import MakeLinear, as_it_is
from runtime.model.linears.table import make_linear
from runtime.model.parts.attention import Attend, attend


@dataclass(frozen=True)
class Form:
    """A device's variant of each such part. The defaults are those that the TPU's compiler handles well."""

    make_linear: MakeLinear = make_linear
    # The fewest rows a matrix product is given, reached by copying rows: a TPU hands a single row to its vector unit,
    # which takes up to five times as long as the matrix unit takes for two.
    least_rows: int = 1
    attend_one: Attend = attend  # for one token per row
    attend_many: Attend = attend  # for several tokens per row
    materialize: Callable[[torch.Tensor], torch.Tensor] = (
        as_it_is  # for values that all layers use and none should recompute
    )
