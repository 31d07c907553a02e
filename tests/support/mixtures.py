"""Models whose weights are in several formats, made as a caller from Python makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from by_hand import decoded, quantized_names
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantize.job import QuantizeRequest, quantize

# Groups of 64 lie on two heads of 48. Three chips divide neither the heads nor the feed-forward layer's 5 groups.
SIZES: dict[str, Any] = {
    "heads": 4,
    "kv_heads": 2,
    "hidden": 128,
    "head_dim": 48,
    "layers": 3,
    "ffn": 320,
    "vocab": 211,
}
_IN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_OUT = ("self_attn.o_proj", "mlp.down_proj")
# By layer: q, k, v, gate, up; o, down. In the second layer q, k and v are of one format, in the third gate and up.
_LAYERS = (
    (("int4-g64", "int8", "unquantized", "int4-g64", "int8"), ("int4-g32-zp", "int8-g64")),
    (("int4-g64", "int4-g64", "int4-g64", "fp8", "unquantized"), ("int8", "int4-g32")),
    (("unquantized", "unquantized", "int4", "int4-g64", "int4-g64"), ("unquantized", "unquantized")),
)
FORMATS = {
    f"model.layers.{layer}.{name}.weight": form
    for layer, each in enumerate(_LAYERS)
    for names, forms in zip((_IN, _OUT), each, strict=True)
    for name, form in zip(names, forms, strict=True)
} | {"lm_head.weight": "int8-g64"}


def shard(checkpoint: Path, out: Path, chips: int, formats: Mapping[str, str] = FORMATS, **changes: Any) -> Path:
    """Shards of a mixture. ``changes`` are further fields of the request."""
    quantize(QuantizeRequest(checkpoint, out, formats, chips, **changes), force=False, dry_run=False)
    return out


def weights_by_hand(one: Path) -> dict[str, torch.Tensor]:
    """What one chip's file stands for, by the parameters' names: float32, or as it is where it isn't quantized."""
    tensors = load_file(one / "chip-00-of-01.safetensors")
    found = {name: tensor for name, tensor in tensors.items() if name.endswith((".weight", ".bias"))}
    for name in quantized_names(tensors):
        values = tensors.get(name + "_packed", tensors.get(name))
        # A file's words may hold more than the weight is wide; none of the widths here leaves any over.
        width = values.shape[1] * (8 if values.dtype == torch.int32 else 1)
        found[name] = torch.from_numpy(decoded(tensors, name, width)).float()
    return found


def reference(checkpoint: Path, one: Path) -> PreTrainedModel:
    """transformers' model in float32 with what one chip's file stands for."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights_by_hand(one), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if model.config.tie_word_embeddings else [], [])
    return model
