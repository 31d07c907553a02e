"""Checkpoints in Meta's own format, written from its description: for tests of reading them.

N files consolidated.NN.pth, each a dictionary saved by torch.save. ColumnParallelLinear layers (wq, wk, wv, w1, w3,
output) are cut by output rows, RowParallelLinear ones (wo, w2) by input columns; LLaMA 1 and 2 cut the embedding by
columns (ParallelEmbedding), LLaMA 3 by rows (VocabParallelEmbedding); norms and the frequencies of RoPE are in each.
Rotary embeddings turn rows 2i and 2i + 1 of a head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
BY_COLUMNS = ("wo", "w2")


def meta_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """A model's weights under Meta's names, whole, in the order of interleaved rotary embeddings."""
    state, config = model.state_dict(), model.config
    tensors = {f"{name}.weight": state[f"{theirs}.weight"] for name, theirs in OUTSIDE.items()}
    for layer in range(config.num_hidden_layers):
        for name, theirs in INSIDE.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if name.endswith(("wq", "wk")):
                pairs = weight.unflatten(0, (-1, 2, config.head_dim // 2))  # [head, half, pair, in]
                weight = pairs.transpose(1, 2).reshape(weight.shape)  # [head, pair, half, in]
            tensors[f"layers.{layer}.{name}.weight"] = weight
    return tensors


def split(tensors: dict[str, torch.Tensor], parts: int, embedding_axis: int) -> list[dict[str, torch.Tensor]]:
    """What each of the parts holds."""
    cut: list[dict[str, torch.Tensor]] = [{} for _ in range(parts)]
    for name, tensor in tensors.items():
        kind = name.removesuffix(".weight").split(".")[-1]
        axis = embedding_axis if kind == "tok_embeddings" else 0 if kind in BY_ROWS else 1
        whole = kind not in (*BY_ROWS, *BY_COLUMNS, "tok_embeddings")
        pieces = [tensor] * parts if whole else tensor.chunk(parts, axis)
        for part, piece in zip(cut, pieces, strict=True):
            part[name] = piece.clone()
    return cut


def params_of(model: LlamaForCausalLM, **fields: Any) -> dict[str, Any]:
    """params.json as LLaMA 1 and 2 have it; a field that is None is left out."""
    config = model.config
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "multiple_of": 4,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
    }
    return {key: value for key, value in (params | fields).items() if value is not None}


def write_meta(
    directory: Path, model: LlamaForCausalLM, parts: int = 2, embedding_axis: int = 1, **fields: Any
) -> Path:
    """``model`` as a directory of Meta's; ``fields`` go into params.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params_of(model, **fields)))
    for number, part in enumerate(split(meta_tensors(model), parts, embedding_axis)):
        part["rope.freqs"] = torch.ones(model.config.head_dim // 2)
        torch.save(part, directory / f"consolidated.{number:02d}.pth")
    return directory


def meta_logits(tensors: dict[str, torch.Tensor], params: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of whole tensors under Meta's names, by the model's definition: pairs of neighbours turn together.

    ``tokens`` [T]. RoPE as multiplication of complex numbers, the feed-forward layer as w2(silu(w1 x) * w3 x).
    """
    dim, heads, kv_heads = params["dim"], params["n_heads"], params["n_kv_heads"]
    half = dim // heads // 2
    angles = torch.arange(len(tokens))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [T, 1, D / 2]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + params["norm_eps"]).rsqrt() * tensors[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    x = tensors["tok_embeddings.weight"][tokens]
    causal = torch.ones(len(tokens), len(tokens)).tril().bool()
    for layer in range(params["n_layers"]):
        prefix = f"layers.{layer}."
        weight = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        y = norm(x, prefix + "attention_norm")
        q, k, v = ((y @ weight[f"attention.w{n}.weight"].T).unflatten(-1, (-1, 2 * half)) for n in "qkv")  # [T, H, D]
        q, k = rotated(q), rotated(k)
        k, v = (tensor.repeat_interleave(heads // kv_heads, 1) for tensor in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / (2 * half) ** 0.5
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        x = x + torch.einsum("hts,shd->thd", weights, v).flatten(1) @ weight["attention.wo.weight"].T
        y = norm(x, prefix + "ffn_norm")
        gate, up = (y @ weight[f"feed_forward.w{n}.weight"].T for n in (1, 3))
        x = x + (torch.nn.functional.silu(gate) * up) @ weight["feed_forward.w2.weight"].T
    return norm(x, "norm") @ tensors["output.weight"].T


def edit_part(directory: Path, number: int, **tensors: torch.Tensor | None) -> None:
    """Put tensors into a part, or (None) take them out; a name is written with __ for its dots."""
    path = directory / f"consolidated.{number:02d}.pth"
    content = torch.load(path, weights_only=True)
    for name, tensor in tensors.items():
        content.pop(name.replace("__", "."), None)
        if tensor is not None:
            content[name.replace("__", ".")] = tensor
    torch.save(content, path)
