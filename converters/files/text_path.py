"""Paths for libraries that take them as text: a name on Linux is any bytes, and need not be text in any encoding."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def text_path(path: Path) -> Iterator[Path]:
    """``path``, or while it isn't text a link to it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="llama-") as folder:
            link = Path(folder) / "link"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path
