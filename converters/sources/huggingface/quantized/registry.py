"""The methods by which a config.json may say that its weights are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from converters.console.errors import InputError, shown
from converters.sources.huggingface.quantized.codec import Method
from converters.sources.huggingface.quantized.compressed_tensors import METHOD as COMPRESSED
from converters.sources.huggingface.quantized.compressed_tensors import CompressedTensors

# By quant_method; made of the checkpoint's name and the fields of quantization_config.
METHODS: dict[str, Callable[[str, dict[str, Any]], Method]] = {
    COMPRESSED: CompressedTensors,
}


def methods_with(name: str) -> list[str]:
    """The titles of the methods that have a tensor of such a name."""
    return []


def find_method(fields: Any, where: str) -> Method | None:
    """The method that the config.json of the checkpoint ``where`` names; None where it names none.

    Raises InputError for a method that isn't read, and for settings of one that change what weights mean.
    """
    if not isinstance(fields, dict):
        return None  # which the reader of the model's dimensions refuses
    described = fields.get("quantization_config") or fields.get("compression_config")
    if not described:
        return None
    named = described.get("quant_method") if isinstance(described, dict) else None
    if named not in METHODS:
        raise InputError(
            f"{where}: config.json describes a model that is already quantized by {shown(named)}; this tool reads "
            f"{', '.join(METHODS)}. Convert its unquantized original."
        )
    return METHODS[named](where, described)
