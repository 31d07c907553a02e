"""fp8 as DeepSeek, Qwen and others publish it: e4m3 with a scale of the tensor or of every block of 128 x 128.

A block's scale is called ``weight_scale_inv``, and the values are multiplied by it all the same.
(transformers, ``integrations/finegrained_fp8.py``; vLLM, ``quantization/fp8.py``)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from converters.console.errors import shown
from converters.console.notes import note
from converters.sources.huggingface.quantized.codec import SCALE_DTYPES, Codec, need, only
from converters.sources.huggingface.quantized.compressed_codecs import scale_of
from converters.sources.huggingface.quantized.float8_codec import Float8Codec
from converters.sources.huggingface.quantized.settings import Settings, is_named
from converters.sources.huggingface.quantized.stripes import Stripes

if TYPE_CHECKING:
    from converters.model.parameters import Parameter
    from converters.sources.huggingface.surplus import Held

METHOD = "fp8"
_KNOWN = ("quant_method", "activation_scheme", "fmt", "weight_block_size", "modules_to_not_convert", "ignored_layers",
          "scale_fmt", "dequantize", "is_checkpoint_fp8_serialized")  # fmt: skip
_INVERSE, _PLAIN = "weight_scale_inv", "weight_scale"


class Fp8:
    """A checkpoint in fp8: see ``Method``."""

    title = METHOD
    left_out = ("input_scale", "activation_scale", "input_scale_inv")
    suffixes = (_INVERSE, _PLAIN, *left_out)
    exceptions = "modules_to_not_convert"

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        """Raises InputError, naming it, for what isn't read."""
        self.fields = fields
        settings = Settings(where, METHOD, fields, "of it e4m3 with a scale for each tensor or block")
        settings.rest(_KNOWN)
        settings.among("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        settings.among("scale_fmt", (None, "ue8m0"))  # that scales are powers of two, and floating-point numbers
        settings.among("is_checkpoint_fp8_serialized", (True,), True)
        block = fields.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
        ):
            settings.refuse(f"weight_block_size {shown(block)}")
        self._block = None if block is None else (block[0], block[1])
        self._left = [*settings.names("modules_to_not_convert"), *settings.names("ignored_layers")]
        scheme = settings.among("activation_scheme", ("dynamic", "static"), "dynamic")
        note(
            f"{where} asks for activations in fp8 too (activation_scheme {scheme!r}); that is ignored: it doesn't "
            "change the weights, and activations are not quantized."
        )

    def codec(self, parameter: Parameter, tensors: Mapping[str, Held], stripes: Stripes) -> Codec:
        name, shape = parameter.name, parameter.shape
        values = need(tensors, "weight", name, shape, ("float8_e4m3fn",))
        if self._block is not None:
            only(tensors, ("weight", _INVERSE))
            blocks = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=True))
            return Float8Codec(
                name, shape, values, need(tensors, _INVERSE, name, blocks, SCALE_DTYPES), None, self._block
            )
        scale = _INVERSE if _INVERSE in tensors else _PLAIN
        only(tensors, ("weight", scale))
        return Float8Codec(name, shape, values, scale_of(tensors, scale, name, shape, "tensor", 1))

    def leaves(self, module: str) -> bool:
        return module == "lm_head" or is_named(module, self._left)
