"""What --fit is given: a slice, or a size."""

from __future__ import annotations

import re

from converters.console.errors import InputError
from quantize.calibration.calibrator import FitTarget
from quantize.slices import find_slice

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def fit_target(given: str, chips: int | None, batch_size: int, max_seq_len: int) -> FitTarget:
    """What ``given`` names: a slice with its cache, or a size of parameters on each of ``chips`` chips (None: one).

    Raises InputError where it is neither, or where ``chips`` contradicts the slice.
    """
    size = _SIZE.fullmatch(given.strip())
    if size is not None:
        count = chips or 1
        name = f"{given} on {'each chip' if count > 1 else 'a chip'}"
        return FitTarget(name, count, weight_bytes=int(float(size[1]) * _UNITS[size[2].upper()]))
    try:
        slice_ = find_slice(given)
    except InputError as error:
        raise InputError(f"--fit takes a slice, or a size per chip like 14GB. {error}") from None
    if chips not in (None, slice_.devices):
        raise InputError(f"--chips {chips} contradicts --fit {given}, which has {slice_.size}. Give one of them.")
    return FitTarget(slice_.name, slice_.devices, slice_, 0, batch_size, max_seq_len)
