"""Opening a path as a source of weights, whatever kind it is."""

from __future__ import annotations

from pathlib import Path

from converters.console.errors import InputError
from converters.output.state import check_finished
from converters.sources import random_init
from converters.sources.huggingface.files import INDEX
from converters.sources.huggingface.source import open_hf
from converters.sources.meta.source import is_meta, open_meta
from converters.sources.registry import find_opener
from converters.sources.single_file import find_gguf, open_file
from converters.sources.source import TensorSource


def open_source(path: Path) -> TensorSource:
    """Open a model's weights: a checkpoint, a Hugging Face or Meta directory, a GGUF file, or shards.

    Reads only headers and small files. Raises InputError where the path is none of these, unfinished or damaged.
    """
    if path.is_file():
        return open_file(path)
    if not path.exists():
        raise InputError(f"{path} does not exist. Give a .gguf file, or a directory of Hugging Face's or Meta's.")
    registered = find_opener(path)
    if registered is not None:
        return registered(path)
    if (path / "shards.json").exists():
        raise InputError(
            f"{path} holds shards, and nothing that reads them is announced by this installation. Install it again "
            "(pip install -e .)."
        )
    check_finished(path, "llama-convert", INDEX)
    if (path / random_init.FILE_NAME).exists():
        return random_init.open_random_init(path)
    if path.is_dir() and (gguf := find_gguf(path)):
        return open_file(gguf)
    return open_meta(path) if is_meta(path) else open_hf(path)
