"""A digest of large files that reads only a sample of them, so that it can be taken on every start."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from converters.model.families.hf_config import to_hf

_HEAD_BYTES = 1 << 20
_PAGE_BYTES = 4096
_PAGES = 64


def fingerprint(config: ModelConfig, files: Iterable[Path], auxiliary: dict[str, bytes]) -> str:
    """The hex sha256 of a configuration, a sample of the weights' files and the auxiliary files (name -> content)."""
    digest = hashlib.sha256(json.dumps(to_hf(config), sort_keys=True).encode())
    digest.update(sample_files(files).encode())
    for name, content in auxiliary.items():
        digest.update(name.encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def sample_files(paths: Iterable[Path]) -> str:
    """The hex sha256 of a sample of each file, in the order given.

    The sample is the file's name (without its folder), its size, its first 1 MiB, its last 4 KiB and 64 evenly spaced
    pages of 4 KiB. It tells files apart but doesn't detect tampering: a change between the sampled pages that keeps the
    size is missed. Raises InputError for a file that can't be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(b"%s\0%d\0" % (os.fsencode(path.name), size))
                for start, length in _ranges(size):
                    file.seek(start)
                    digest.update(file.read(length))
        except OSError as error:
            raise InputError(f"{path} can't be read: {error.strerror}.") from None
    return digest.hexdigest()


def _ranges(size: int) -> Iterator[tuple[int, int]]:
    """The byte ranges (start, length) sampled of a file of ``size`` bytes."""
    yield 0, _HEAD_BYTES
    yield max(0, size - _PAGE_BYTES), _PAGE_BYTES
    for page in range(_PAGES):
        yield size * page // _PAGES // _PAGE_BYTES * _PAGE_BYTES, _PAGE_BYTES
