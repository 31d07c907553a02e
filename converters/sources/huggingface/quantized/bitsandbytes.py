"""bitsandbytes as transformers saves it: int8 by rows, and 4 bits (nf4, fp4) in blocks of the flattened weight.

(https://github.com/bitsandbytes-foundation/bitsandbytes, ``functional.py``)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError
from converters.sources.huggingface.quantized.blocks4_codec import STATE, TYPES, blocks4
from converters.sources.huggingface.quantized.codec import Codec, OnlyRows, need, only
from converters.sources.huggingface.quantized.settings import Settings, is_named
from converters.sources.huggingface.quantized.stripes import Stripes

if TYPE_CHECKING:
    import torch

    from converters.model.parameters import Parameter
    from converters.sources.huggingface.surplus import Held

METHOD = "bitsandbytes"
_RECIPROCAL = 7.874015718698502e-3  # of 127, as bitsandbytes multiplies by it
_KNOWN = (
    "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "llm_int8_skip_modules",
    "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload",
)  # fmt: skip


class BitsAndBytes:
    """A checkpoint of bitsandbytes: see ``Method``."""

    title = METHOD
    left_out = ()
    suffixes = (
        *(f"weight.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
        *(f"weight.{STATE}{kind}" for kind in TYPES),
        "SCB",
        "weight_format",
    )
    exceptions = "llm_int8_skip_modules"

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        """Raises InputError, naming it, for what isn't read."""
        self.fields = fields
        settings = Settings(where, METHOD, fields, "of it int8, nf4 and fp4")
        settings.rest(_KNOWN)
        in_4_bits = settings.among("load_in_4bit", (True, False), False)
        if in_4_bits == settings.among("load_in_8bit", (True, False), False):
            settings.refuse(f"load_in_4bit {in_4_bits} and load_in_8bit {in_4_bits}")
        self._kind = settings.among("bnb_4bit_quant_type", TYPES, TYPES[-1]) if in_4_bits else None
        if in_4_bits:
            settings.among("bnb_4bit_quant_storage", ("uint8",), "uint8")
        self._left = settings.names("llm_int8_skip_modules")

    def codec(self, parameter: Parameter, tensors: Mapping[str, Held], stripes: Stripes) -> Codec:
        name, shape = parameter.name, parameter.shape
        if self._kind is not None:
            return blocks4(name, shape, self._kind, tensors)
        only(tensors, ("weight", "SCB", "weight_format"))
        values = need(tensors, "weight", name, shape, ("int8",))
        scale = need(tensors, "SCB", name, (shape[0],), ("float32", "float16"))
        if "weight_format" in tensors:
            _check_by_rows(tensors["weight_format"])
        return _Int8Codec(name, shape, values, scale)

    def leaves(self, module: str) -> bool:
        return module == "lm_head" or is_named(module, self._left)


def _check_by_rows(held: Held) -> None:
    """Raise InputError where values are stored in the order of a GPU's tiles."""
    if held.shape not in ((), (1,)) or held.whole().item() != 0:
        raise InputError(
            f"{held.path}: {held.name} says that values are in the order of a GPU's tiles; this tool reads only rows. "
            "Save the model again with a newer bitsandbytes, or convert the unquantized original."
        )


@dataclass
class _Int8Codec(OnlyRows):
    """int8 [out, in] times the largest magnitude of each output over 127."""

    name: str
    shape: tuple[int, int]
    weight: Held = field(repr=False)
    largest: Held = field(repr=False)

    title = "int8, a largest magnitude for each output"
    why = "it is divided by 127, which no scale does exactly"

    def rows(self, start: int, stop: int) -> torch.Tensor:
        largest = self.largest.rows(start, stop).float()[:, None]
        return self.weight.rows(start, stop).float().mul_(largest).mul_(_RECIPROCAL)
