"""Values that no weight may have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converters.console.errors import InputError

if TYPE_CHECKING:
    import torch


def check_finite(values: torch.Tensor, name: str) -> None:
    """Raise InputError, naming the tensor, where some of its values are NaN or infinite."""
    if values.abs().amax().isfinite():  # several times as fast as isfinite on every value
        return
    if str(values.dtype) == "torch.float16":
        raise InputError(
            f"The tensor {name} holds NaN, or values that are infinite or too large for float16. Convert it with "
            "--dtype bfloat16, or give another source."
        )
    raise InputError(f"The tensor {name} holds NaN or infinite values. Fetch the source again, or give another.")
