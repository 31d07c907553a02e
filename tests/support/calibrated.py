"""A small model and text to calibrate it on, for tests of what is made with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from models import make_model, snapshot

from quantize.shards.reading import Shards

# Groups of 64 lie on two heads of 48. Three chips divide neither the heads nor the feed-forward layer's 5 groups.
SIZES: dict[str, Any] = {
    "heads": 4,
    "kv_heads": 2,
    "hidden": 128,
    "head_dim": 48,
    "layers": 4,
    "ffn": 320,
    "vocab": 211,
}
TOKENS = 600


def write_text(path: Path, seed: int = 0, count: int = TOKENS) -> Path:
    """Token ids in which some are much more frequent than others."""
    draw = torch.Generator().manual_seed(seed)
    ids = (torch.rand(count, generator=draw).pow(3) * 211).long()
    path.write_text(json.dumps(ids.tolist()))
    return path


def make_inputs(root: Path) -> tuple[Path, Path]:
    """The model, whose inputs differ in size, and the text."""
    model = make_model(root / "hf", **SIZES)
    for layer in model.model.layers:
        spread(layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    model.save_pretrained(root / "hf")
    return root / "hf", write_text(root / "text.json")


@torch.no_grad()
def spread(*norms: torch.Tensor) -> None:
    """Make the weights [E] of norms, and so what comes out of them, differ much."""
    for weight in norms:
        weight.copy_(torch.exp(1.5 * torch.randn(len(weight), generator=torch.Generator().manual_seed(0))))
        weight /= weight.square().mean().sqrt()


def values(out: Path) -> dict[str, torch.Tensor]:
    """What shards hold, whole, by name."""
    shards = Shards(out)
    return {name: shards.rows(name, 0, tensor.shape[0]) for name, tensor in shards.tensors.items()}


def content(out: Path) -> dict[str, str]:
    """Digests of a directory's files but for the record, which names the files' times."""
    return {name: digest for name, digest in snapshot(out).items() if name != ".written.json"}
