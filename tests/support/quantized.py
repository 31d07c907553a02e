"""Small models whose linears are stored as other tools quantize them, and what these stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from models import edit_json, make_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

HEAD = "lm_head.weight"
DOWN, KEY = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"
# Three chips divide neither the heads nor the feed-forward layer.
SIZES: dict[str, Any] = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 64, "ffn": 96, "vocab": 131}
Stored = tuple[dict[str, torch.Tensor], torch.Tensor]  # by what follows the module's name; and what they stand for
Encode = Callable[[str, torch.Tensor], Stored]


def write_quantized(
    directory: Path, described: dict[str, Any], encode: Encode, plain: Iterable[str] = (HEAD,), **sizes: Any
) -> dict[str, torch.Tensor]:
    """A small LLaMA whose linears are as ``encode`` stores them, but for those in ``plain``.

    config.json has ``described`` as its quantization_config. Returns what all its weights stand for, in float32.
    """
    make_model(directory, **(SIZES | sizes))
    tensors, weights = {}, {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name in plain or tensor.dim() == 1 or "embed" in name:
            tensors[name] = weights[name] = tensor
            continue
        parts, weights[name] = encode(name, tensor)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit_json(directory / "config.json", lambda content: content.update(quantization_config=described))
    return weights


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write the tensors of a model again, after ``change`` of the dictionary that holds them."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def change_settings(directory: Path, **fields: Any) -> None:
    """Change fields of config.json's quantization_config; None removes one."""

    def change(content: dict[str, Any]) -> None:
        described = content["quantization_config"] | fields
        content["quantization_config"] = {key: value for key, value in described.items() if value is not None}

    edit_json(directory / "config.json", change)


def reference(directory: Path, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """transformers' model with these weights, in float32."""
    fields = json.loads((directory / "config.json").read_text())
    fields.pop("quantization_config")
    model = LlamaForCausalLM(LlamaConfig(**fields)).float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([HEAD] if model.config.tie_word_embeddings else [], [])
    return model


def grid(
    weight: torch.Tensor, bits: int, group: int, dtype: torch.dtype, zero_points: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers from 0 to 2^bits - 1 [out, in], scales [out, groups] in ``dtype`` and zero points [out, groups]: int64.

    The last group may have fewer inputs than ``group``. Zero points are the middle without ``zero_points``.
    """
    top, out, inputs = 2**bits - 1, *weight.shape
    groups = -(-inputs // group)
    padded = torch.nn.functional.pad(weight.double(), (0, groups * group - inputs)).view(out, groups, group)
    low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
    if zero_points:
        scale = ((high - low) / top).to(dtype)
        zeros = (-low / scale.double()).round().clamp(1, top)
    else:
        scale = (torch.maximum(-low, high) / (top // 2)).to(dtype)
        zeros = torch.full_like(low, (top + 1) // 2)
    values = (padded / scale.double()[:, :, None]).round() + zeros[:, :, None]
    return values.clamp(0, top).view(out, -1)[:, :inputs].long(), scale, zeros.long()


def stand_for(values: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(values - zeros) * scale in float64, rounded once to float32; ``groups`` [in] is the group of every input."""
    return ((values - zeros[:, groups]).double() * scale.double()[:, groups]).float()
