"""Where mapped memory lies in its file, so that it can be read from the file and the mapping never becomes resident.

Touching a page of a mapping makes its neighbours resident too, and releasing the touched pages leaves those.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Mapping(NamedTuple):
    """Addresses [start, stop) of this process where a file is mapped from its byte ``offset`` on."""

    start: int
    stop: int
    offset: int


def mappings(path: Path) -> list[Mapping]:
    """The mappings of a file in this process; none on systems without Linux's /proc/self/maps."""
    # A line holds addresses, permissions, offset, device, inode and, with newlines escaped, the path.
    name = os.fsencode(os.path.realpath(path)).replace(b"\n", b"\\012")
    try:
        lines = Path("/proc/self/maps").read_bytes().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == name:
            start, stop = (int(address, 16) for address in fields[0].split(b"-"))
            found.append(Mapping(start, stop, int(fields[2], 16)))
    return found


def file_offset(places: list[Mapping], address: int, nbytes: int) -> int | None:
    """The byte of the file that is mapped at ``address``; None where no mapping has the ``nbytes`` from there on."""
    for place in places:
        if place.start <= address and address + nbytes <= place.stop:
            return address - place.start + place.offset
    return None
