"""Paths for libraries that take them as text: on Linux a name may be any bytes, which need not be valid text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def text_path(path: Path) -> Iterator[Path]:
    """``path``, or where it isn't valid text, a temporary link to it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="llama-") as folder:
            link = Path(folder) / "link"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path
