"""Small files that were downloaded instead of the real ones: Git LFS pointers and web pages."""

from __future__ import annotations

from pathlib import Path

from converters.console.errors import InputError

_POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html")
_LONGEST = max(len(beginning) for beginning in (_POINTER, *_PAGES))


def stand_in(content: bytes) -> str:
    """What a stand-in that begins with ``content`` is, and what to do about it; empty for any other file."""
    if content.startswith(_POINTER):
        return "a pointer of Git LFS in place of the file itself. Run in its directory: git lfs pull."
    if content[:_LONGEST].lstrip().lower().startswith(_PAGES):
        return "a web page in place of the file itself, whose address has /resolve/ where the page has /blob/."
    return ""


def check_itself(path: Path) -> None:
    """Raise InputError for a stand-in. A file that can't be read is left to its reader."""
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST)
    except OSError:
        return
    if what := stand_in(content):
        raise InputError(f"{path} is {what}")
