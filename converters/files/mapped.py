"""Where mapped memory lies in its file: to read from there, so that pages of the mapping never become resident.

A page that is touched through a mapping brings its neighbours along, and giving back what was asked for leaves those.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Mapping(NamedTuple):
    """Addresses [start, stop) of this process, which show a file from byte ``offset`` on."""

    start: int
    stop: int
    offset: int


def mappings(path: Path) -> list[Mapping]:
    """Where this process has a file mapped now; nothing on systems without Linux's /proc/self/maps."""
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
    """The file's byte that ``address`` shows; None where the ``nbytes`` from there are not in one of the mappings."""
    for place in places:
        if place.start <= address and address + nbytes <= place.stop:
            return address - place.start + place.offset
    return None
