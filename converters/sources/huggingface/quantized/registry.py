"""The methods by which a config.json may say that its weights are quantized."""

from __future__ import annotations

from typing import Any

from converters.console.errors import InputError, shown
from converters.sources.huggingface.quantized.awq import METHOD as AWQ
from converters.sources.huggingface.quantized.awq import Awq
from converters.sources.huggingface.quantized.bitsandbytes import METHOD as BITS_AND_BYTES
from converters.sources.huggingface.quantized.bitsandbytes import BitsAndBytes
from converters.sources.huggingface.quantized.codec import Method
from converters.sources.huggingface.quantized.compressed_tensors import METHOD as COMPRESSED
from converters.sources.huggingface.quantized.compressed_tensors import CompressedTensors
from converters.sources.huggingface.quantized.fp8 import METHOD as FP8
from converters.sources.huggingface.quantized.fp8 import Fp8
from converters.sources.huggingface.quantized.gptq import METHOD as GPTQ
from converters.sources.huggingface.quantized.gptq import Gptq

# By quant_method; made of the checkpoint's name and the fields of quantization_config.
METHODS: dict[str, type[Method]] = {
    COMPRESSED: CompressedTensors,
    FP8: Fp8,
    GPTQ: Gptq,
    AWQ: Awq,
    BITS_AND_BYTES: BitsAndBytes,
}


def methods_with(name: str) -> list[str]:
    """The titles of the methods that have a tensor of such a name."""
    return [each.title for each in METHODS.values() if name.endswith(tuple(f".{suffix}" for suffix in each.suffixes))]


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
        how = "a method that it doesn't name" if named is None else shown(named)
        raise InputError(
            f"{where}: config.json describes a model that is already quantized by {how}; this tool reads "
            f"{', '.join(METHODS)}. Convert its unquantized original."
        )
    return METHODS[named](where, described)
