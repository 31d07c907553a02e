"""GPTQ as AutoGPTQ and GPTQModel store it: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``, all with outputs last.

``qweight`` int32 [in * bits / 32, out] holds integers along the inputs, ``qzeros`` [groups, out * bits / 32] zero
points along the outputs, both from the lowest bits up and of 3 bits without gaps. ``g_idx`` [in] is the group of every
input. In the format "gptq" a zero point is stored less 1; in "gptq_v2" as it is. (https://github.com/ModelCloud/GPTQModel)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError, shown
from converters.files.row_blocks import row_blocks
from converters.formats.word_integers import WORD_BITS, Period, unpack_words
from converters.sources.huggingface.quantized.codec import SCALE_DTYPES, Codec, IntegerCodec, need, only
from converters.sources.huggingface.quantized.settings import Settings
from converters.sources.huggingface.quantized.stripes import Stripes

if TYPE_CHECKING:
    import torch

    from converters.model.parameters import Parameter
    from converters.sources.huggingface.surplus import Held

METHOD = "gptq"
_FIRST, _SECOND = "gptq", "gptq_v2"
# What says how values were found, where from, or what computes with them.
_KNOWN = (
    "quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "pack_dtype", "lm_head",
    "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "act_group_aware", "mse", "hyb_act",
    "dataset", "tokenizer", "model_name_or_path", "model_file_base_name", "model_seqlen", "meta", "batch_size",
    "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "pad_token_id",
    "cache_block_outputs", "cache_examples_on_gpu", "max_input_length", "use_cuda_fp16", "use_exllama",
    "disable_exllama", "exllama_config", "backend", "device", "parallel_packing", "quant_method_version", "version",
    "v2", "v2_alpha", "v2_memory_device", "offload_to_disk", "offload_to_disk_path", "awq_gemm_checkpoint",
    "quantizer", "modules_to_not_convert",
)  # fmt: skip


class Gptq:
    """A checkpoint of GPTQ: see ``Method``."""

    title = "GPTQ"
    left_out = ()
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    exceptions = "lm_head"

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        """Raises InputError, naming it, for what isn't read."""
        self.fields = fields
        settings = Settings(where, METHOD, fields, "of it 2, 3, 4 and 8 bits in the formats gptq and gptq_v2")
        settings.rest(_KNOWN)
        self._bits = settings.among("bits", (2, 3, 4, 8))
        group = settings.whole("group_size")
        self._group = None if group == -1 else group
        settings.among("sym", (True, False), True)  # zero points are stored either way
        self._act_order = settings.among("desc_act", (True, False), False)
        settings.among("pack_dtype", ("int32",), "int32")
        said = settings.fields.get("checkpoint_format"), settings.fields.get("format")
        if None not in said and said[0] != said[1]:
            settings.refuse(f"checkpoint_format {shown(said[0])} and format {shown(said[1])}")
        which = "checkpoint_format" if said[0] is not None else "format"
        self._added = 1 if settings.among(which, (_FIRST, _SECOND), _FIRST) == _FIRST else 0
        self._head = settings.among("lm_head", (True, False), False)

    def codec(self, parameter: Parameter, tensors: Mapping[str, Held], stripes: Stripes) -> Codec:
        name, (out, inputs), bits = parameter.name, parameter.shape, self._bits
        period, groups = Period.of(bits), 1 if self._group is None else -(-inputs // self._group)
        for size, what in ((inputs, "inputs"), (out, "outputs")):
            if size % period.elements:
                raise InputError(
                    f"{name} has {size} {what}, and GPTQ's integers of {bits} bits come {period.elements} at a time. "
                    "Convert the unquantized original."
                )
        need(tensors, "qweight", name, (inputs * bits // WORD_BITS, out), ("int32",))
        need(tensors, "qzeros", name, (groups, out * bits // WORD_BITS), ("int32",))
        scale = need(tensors, "scales", name, (groups, out), SCALE_DTYPES)
        g_idx = self._order(tensors, name, inputs, groups)
        only(tensors, self.suffixes)
        fields = (name, parameter.shape, bits, self._group, scale.dtype, True, tensors, stripes, g_idx)
        return _GptqCodec(*fields, added=self._added)

    def leaves(self, module: str) -> bool:
        return module == "lm_head" and not self._head

    def _order(self, tensors: Mapping[str, Held], name: str, inputs: int, groups: int) -> torch.Tensor | None:
        """The group of every input, int64 [in]; None where groups are of consecutive ones."""
        import torch

        if "g_idx" not in tensors and not self._act_order:
            return None
        held = need(tensors, "g_idx", name, (inputs,), ("int32", "int64"))
        found, consecutive = held.whole().long(), torch.arange(inputs) // (self._group or inputs)
        if torch.equal(found, consecutive):
            return None
        if not self._act_order:
            raise InputError(
                f"{held.path}: {held.name} orders inputs by their activations, but config.json says desc_act false: "
                "one of them is of another model."
            )
        if found.amin() < 0 or found.amax() >= groups:
            raise InputError(f"{held.path}: {held.name} names groups beyond the {groups} that have scales.")
        return found


@dataclass
class _GptqCodec(IntegerCodec):
    """A weight in GPTQ's tensors; zero points are stored less ``added``."""

    added: int = 0

    def values(self, start: int, stop: int) -> torch.Tensor:
        words = self.stripes.columns(self.tensors["qweight"], start, stop)
        return unpack_words(words.T.contiguous(), self.bits, self.shape[1])

    def scale(self, start: int, stop: int) -> torch.Tensor:
        return self.stripes.columns(self.tensors["scales"], start, stop).T.contiguous()

    def zeros(self, start: int, stop: int) -> torch.Tensor:
        first, last, begin = Period.of(self.bits).around(start, stop)
        words = self.stripes.columns(self.tensors["qzeros"], first, last).contiguous()
        zeros = unpack_words(words, self.bits, stop - begin)[:, start - begin :].T.contiguous()
        if self.added and (zeros == (1 << self.bits - 1) - 1).any():
            held = self.tensors["qzeros"]
            raise InputError(
                f"{held.path}: {held.name} holds zero points of {2**self.bits - 1}, less 1 as its format has them: "
                f"some tools take that for 0, others for {2**self.bits}. Convert it to gptq_v2, or take the original."
            )
        return zeros + self.added

    def _has_zeros(self) -> bool:
        return any(self.zeros(*block).any() for block in row_blocks(0, self.shape[0], self.groups))
