"""The decoder's attention layer: attention over the cache, and the linears around it. Shapes as in decoder.py."""

from __future__ import annotations

import torch
from torch import nn

from converters.model.config import ModelConfig
from quantize.shards.partition import HeadPlan
from runtime.model.device_form import Form
from runtime.model.kv_cache import KVCache
from runtime.model.parts.rotary import Rotary, rotate
from runtime.model.weights import Weights


class AttentionLayer(nn.Module):
    """Grouped-query attention over the cache, with query heads grouped under their KV heads."""

    def __init__(self, weights: Weights, prefix: str, heads: HeadPlan, config: ModelConfig, form: Form) -> None:
        super().__init__()
        self.heads, self.head_dim, self.form = heads, config.head_dim, form
        architecture = config.architecture
        self.qkv_proj = weights.projections(prefix + "q_proj", (heads.group, 1, 1), heads.chips, architecture.biases)
        self.o_proj = weights.linear(prefix + architecture.attention_out, architecture.biases)

    def forward(
        self,
        x: torch.Tensor,  # [C * B, T, E], C copies of every row
        rotary: Rotary | None,  # cos and sin, [B, T, D]; None without rotary positions
        mask: torch.Tensor,  # [B, T, S], true where a token may attend; only the cache's first S slots are read
        slots: torch.Tensor,  # [T]
        cache: KVCache,
        layer: int,
    ) -> torch.Tensor:
        batch, length, heads, size = cache.batch_size, x.shape[1], self.heads, self.head_dim
        q, k, v = self.qkv_proj(x)
        q = q.reshape(-1, batch, length, heads.kv_places, heads.group, size)
        k = k[:batch].reshape(batch, length, heads.kv_places, size)
        v = v[:batch].reshape(batch, length, heads.kv_places, size)
        copies = q.shape[0]
        # Copies of a row attend to the same keys, so they are treated as more query heads of the same group.
        q = q.permute(1, 2, 3, 0, 4, 5).reshape(batch, length, heads.kv_places, copies * heads.group, size)
        if rotary is not None:
            cos, sin = rotary
            q = rotate(q, cos[:, :, None, None], sin[:, :, None, None])
            k = rotate(k, cos[:, :, None], sin[:, :, None])
        asked, least_rows = q.shape[3], self.form.least_rows
        if asked * length < least_rows:
            q = torch.cat([q] * -(-least_rows // (asked * length)), dim=3)
        cached = cache.update(layer, slots, k.transpose(1, 2), v.transpose(1, 2))  # [B, H, S, D] each
        cached = [tensor[:, :, : mask.shape[-1]] for tensor in cached]
        attend = self.form.attend_one if length == 1 else self.form.attend_many
        y = attend(q, cached, mask)[:, :, :, :asked].to(x.dtype)
        y = y.view(batch, length, heads.kv_places, copies, heads.group, size).permute(3, 0, 1, 2, 4, 5)
        return self.o_proj(y.reshape(copies * batch, length, -1))
