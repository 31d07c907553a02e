"""Sizes, counts and times as people read and write them; 1 GB is 10^9 bytes, as for disks and in the post."""

from __future__ import annotations

import math
import re

from converters.console.errors import InputError

_FACTORS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """``5GB`` -> 5000000000 bytes. Raises InputError for anything but a positive size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", text.strip().upper())
    factor = _FACTORS.get(match[2]) if match else None
    size = float(match[1]) * factor if match and factor else 0
    if not 1 <= size < math.inf:
        raise InputError(f"{text!r} is no size; write it like 500MB or 5GB.")
    return int(size)


def parse_integers(text: str) -> tuple[int, ...]:
    """``1,2,3`` -> (1, 2, 3). Raises ValueError for anything else, even ``1_000``, which Python accepts."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"-?[0-9]+", part) for part in parts):
        raise ValueError(text)
    return tuple(map(int, parts))


def format_bytes(count: int) -> str:
    """5000000000 -> ``5.00 GB``."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def format_seconds(seconds: float) -> str:
    """4000 -> ``1 h 7 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_count(count: int) -> str:
    """6738415616 -> ``6.74 B`` (parameters, in thousands, millions, billions)."""
    for unit, factor in ((" B", 10**9), (" M", 10**6), (" k", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f}{unit}"
    return str(count)
