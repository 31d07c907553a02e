"""What a model is called: by what its files say, or else by its folder, also in a cache of Hugging Face's hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Such a cache keeps a repository's files in models--OWNER--NAME/snapshots/REVISION; not all names have an owner.
_REPOSITORY = re.compile(r"models--(?:.+?--)?(.+)")
_SNAPSHOTS = "snapshots"
_BLOBS = "blobs"  # and beside the snapshots the files themselves, by their hash
_HASH = re.compile(r"(?:sha256[-:])?(?:[0-9a-f]{40}|[0-9a-f]{64})")  # as such caches, and Ollama's, name files
_GGUF = re.compile(r"(?:-\d{5}-of-\d{5})?\.gguf(?:\.\w+)*$|-\d{5}-of-\d{5}$", re.IGNORECASE)


def is_name(text: str) -> bool:
    """Whether a text can be a model's name: no hash, and no way of pointing at a folder."""
    return text.strip() not in ("", ".", "..") and not _HASH.fullmatch(text)


def name_in_path(path: str) -> str:
    """The name that a path or an id of the hub says, empty where it says none. No file system is asked."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    for at in range(len(parts) - 2, 0, -1):
        if parts[at] == _SNAPSHOTS and (repository := _REPOSITORY.fullmatch(parts[at - 1])):
            return repository[1]
    if len(parts) > 2 and _HASH.fullmatch(parts[-1]) and parts[-2] == _SNAPSHOTS:
        return parts[-3]
    return parts[-1] if parts and is_name(parts[-1]) else ""


def name_of_directory(directory: Path) -> str:
    """The name by a directory's own path, or by where a link leads, where its own says none."""
    return name_in_path(os.path.abspath(directory)) or name_in_path(str(directory.resolve()))


def name_of_file(path: Path) -> str:
    """The name that a GGUF file's own says, or the cache that it is in; empty where neither does."""
    name = _GGUF.sub("", path.name)
    if is_name(name):
        return name
    *_, repository, folder, _ = ("", "", *path.absolute().parts)
    cached = _REPOSITORY.fullmatch(repository) if folder == _BLOBS else None
    return cached[1] if cached else ""
