"""AWQ as AutoAWQ's version "gemm" stores it: ``qweight``, ``qzeros`` and ``scales``, all with outputs last.

``qweight`` int32 [in, out / 8] holds eight outputs to a word: from the lowest bits up those numbered 0, 2, 4, 6, 1, 3,
5, 7. So does ``qzeros`` [groups, out / 8]. (https://github.com/casper-hansen/AutoAWQ, ``utils/packing_utils.py``)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError
from converters.formats.word_integers import unpack_words
from converters.sources.huggingface.quantized.codec import SCALE_DTYPES, Codec, IntegerCodec, need, only
from converters.sources.huggingface.quantized.settings import Settings, is_named
from converters.sources.huggingface.quantized.stripes import Stripes

if TYPE_CHECKING:
    import torch

    from converters.model.parameters import Parameter
    from converters.sources.huggingface.surplus import Held

METHOD = "awq"
_BITS, _PER_WORD = 4, 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of outputs 0 to 7 in a word, from the lowest bits
_KNOWN = (
    "quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "backend", "do_fuse",
    "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert", "exllama_config",
)  # fmt: skip


class Awq:
    """A checkpoint of AWQ: see ``Method``."""

    title = "AWQ"
    left_out = ()
    suffixes = ("qweight", "qzeros", "scales")
    exceptions = "modules_to_not_convert"

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        """Raises InputError, naming it, for what isn't read."""
        self.fields = fields
        settings = Settings(where, METHOD, fields, "of it 4 bits with zero points in the version 'gemm'")
        settings.rest(_KNOWN)
        settings.among("bits" if "bits" in fields else "w_bit", (_BITS,))
        settings.among("zero_point", (True,), True)
        settings.among("version", ("gemm", "GEMM"), "gemm")
        group = settings.whole("group_size" if "group_size" in fields else "q_group_size")
        self._group = None if group == -1 else group
        self._left = settings.names("modules_to_not_convert")

    def codec(self, parameter: Parameter, tensors: Mapping[str, Held], stripes: Stripes) -> Codec:
        name, (out, inputs) = parameter.name, parameter.shape
        group = self._group or inputs
        if out % _PER_WORD or inputs % group:
            raise InputError(
                f"{name} is of shape {[out, inputs]}, but AWQ packs {_PER_WORD} outputs to a word and {group} inputs "
                "to a group. Convert the unquantized original."
            )
        need(tensors, "qweight", name, (inputs, out // _PER_WORD), ("int32",))
        need(tensors, "qzeros", name, (inputs // group, out // _PER_WORD), ("int32",))
        scale = need(tensors, "scales", name, (inputs // group, out), SCALE_DTYPES)
        only(tensors, self.suffixes)
        return _AwqCodec(name, parameter.shape, _BITS, self._group, scale.dtype, True, tensors, stripes)

    def leaves(self, module: str) -> bool:
        return module == "lm_head" or is_named(module, self._left)


@dataclass
class _AwqCodec(IntegerCodec):
    """A weight in AWQ's tensors."""

    def values(self, start: int, stop: int) -> torch.Tensor:
        return self._outputs("qweight", start, stop)

    def scale(self, start: int, stop: int) -> torch.Tensor:
        return self.stripes.columns(self.tensors["scales"], start, stop).T.contiguous()

    def zeros(self, start: int, stop: int) -> torch.Tensor:
        return self._outputs("qzeros", start, stop)

    def _outputs(self, part: str, start: int, stop: int) -> torch.Tensor:
        """Integers of outputs [start, stop), less 8: int8 [n, inputs or groups]."""
        first, last = start // _PER_WORD, (stop - 1) // _PER_WORD + 1
        words = self.stripes.columns(self.tensors[part], first, last).T.contiguous()  # [words, inputs]
        places = unpack_words(words.view(-1, 1), _BITS, _PER_WORD).view(*words.shape, _PER_WORD)
        outputs = places[:, :, list(_PLACES)].transpose(1, 2).flatten(0, 1)
        return outputs[start - first * _PER_WORD : stop - first * _PER_WORD].contiguous()
