"""The decoder as a plain module of fixed shapes, which knows no device; its parts are those of an architecture.

Shapes: B rows, T tokens of one call, S slots of the cache, H KV heads (over all chips), G query heads under each, D the
head dimension, E the hidden size, V the vocabulary.

Rows are aligned at their ends: all rows write the same slots, and a shorter row begins ``offsets[b]`` slots later. So
one index serves index_copy for the whole batch, and a row's position is its slot minus its offset.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from converters.model.architecture import Architecture, FeedForward, Positions
from converters.model.config import ModelConfig
from converters.model.parameters import EMBEDDING, LM_HEAD, POSITIONS, PROJECT_IN, PROJECT_OUT
from converters.model.rope import inverse_frequencies
from quantize.formats.floating import Floating
from quantize.shards.partition import HeadPlan
from runtime.model.decoder_tensors import FUSED, DecoderParameters
from runtime.model.device_form import Form
from runtime.model.kv_cache import KVCache
from runtime.model.linears.linear import LinearWeight
from runtime.model.norms import make_norm
from runtime.model.weights import Projections, Weights


class Attention(nn.Module):
    """Grouped-query attention over the cache, query heads laid out under their KV heads."""

    def __init__(self, weights: Weights, prefix: str, heads: HeadPlan, config: ModelConfig, form: Form) -> None:
        super().__init__()
        self.heads, self.head_dim, self.form = heads, config.head_dim, form
        made_of = config.architecture
        self.qkv_proj = weights.projections(prefix, "qkv_proj", (heads.group, 1, 1), heads.chips, made_of.biases)
        self.o_proj = weights.linear(prefix + made_of.attention_out, made_of.biases)

    def forward(
        self,
        x: torch.Tensor,  # [C * B, T, E], C copies of every row
        turn: tuple[torch.Tensor, torch.Tensor] | None,  # cos and sin, [B, T, D], of rotary positions
        mask: torch.Tensor,  # [B, T, S], true where a token may look: at the cache's first S slots, and no others
        slots: torch.Tensor,  # [T]
        cache: KVCache,
        layer: int,
    ) -> torch.Tensor:
        batch, length, heads, size = cache.batch_size, x.shape[1], self.heads, self.head_dim
        q, k, v = self.qkv_proj(x)
        q = q.reshape(-1, batch, length, heads.kv_slots, heads.group, size)
        k = k[:batch].reshape(batch, length, heads.kv_slots, size)
        v = v[:batch].reshape(batch, length, heads.kv_slots, size)
        copies = q.shape[0]
        # Copies of a row look at the same keys, as the query heads of a group do.
        q = q.permute(1, 2, 3, 0, 4, 5).reshape(batch, length, heads.kv_slots, copies * heads.group, size)
        if turn is not None:
            cos, sin = turn
            q = _rotate(q, cos[:, :, None, None], sin[:, :, None, None])
            k = _rotate(k, cos[:, :, None], sin[:, :, None])
        asked, least_rows = q.shape[3], self.form.least_rows
        if asked * length < least_rows:
            q = torch.cat([q] * -(-least_rows // (asked * length)), dim=3)
        cached = cache.update(layer, slots, k.transpose(1, 2), v.transpose(1, 2))  # [B, H, S, D] each
        cached = [tensor[:, :, : mask.shape[-1]] for tensor in cached]
        attend = self.form.attend_one if length == 1 else self.form.attend_many
        y = attend(q, cached, mask)[:, :, :, :asked].to(x.dtype)
        y = y.view(batch, length, heads.kv_slots, copies, heads.group, size).permute(3, 0, 1, 2, 4, 5)
        return self.o_proj(y.reshape(copies * batch, length, -1))


class SwiGLU(nn.Module):
    """The gated feed-forward layer (Shazeer 2020)."""

    def __init__(self, gate_up: Projections, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x)  # [..., chips, F / chips]
        return self.down((nn.functional.silu(gate) * up).flatten(-2))


class ReLU(nn.Module):
    """The feed-forward layer of the first Transformer (Vaswani et al. 2017)."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.relu(self.up(x)))


def _feed_forward(weights: Weights, prefix: str, made_of: Architecture, chips: int) -> nn.Module:
    first, down = prefix + made_of.feed_forward_in[0], weights.linear(prefix + made_of.feed_forward_out, made_of.biases)
    if made_of.feed_forward is FeedForward.RELU:
        return ReLU(weights.linear(first, made_of.biases), down)
    within = first.removesuffix(FUSED["gate_up_proj"][0])
    return SwiGLU(weights.projections(within, "gate_up_proj", (1, 1), chips, made_of.biases), down)


class Block(nn.Module):
    """One layer of the decoder: attention and feed-forward layer, each added to what goes in."""

    def __init__(
        self,
        weights: Weights,
        prefix: str,
        config: ModelConfig,
        heads: HeadPlan,
        dtype: torch.dtype,
        form: Form,
    ) -> None:
        super().__init__()
        made_of = config.architecture
        self.norm_first, self.dtype = made_of.norm_first, dtype
        normed = dtype if self.norm_first else torch.float32  # behind the sums, norms give the next layer's input
        self.attention_norm = make_norm(weights, prefix + made_of.attention_norm, config, normed)
        self.attention = Attention(weights, prefix + "self_attn.", heads, config, form)
        self.feed_forward_norm = make_norm(weights, prefix + made_of.feed_forward_norm, config, normed)
        self.feed_forward = _feed_forward(weights, prefix, made_of, heads.chips)

    def forward(
        self,
        x: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor,
        slots: torch.Tensor,
        cache: KVCache,
        layer: int,
    ) -> torch.Tensor:
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), turn, mask, slots, cache, layer)
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = self.attention_norm(x + self.attention(x.to(self.dtype), turn, mask, slots, cache, layer))
        return self.feed_forward_norm(x + self.feed_forward(x.to(self.dtype)))


class Decoder(nn.Module):
    """A model over tensors as the shards of ``heads.chips`` chips hold them, put together along their shard axes.

    ``dtype`` is that of cache, activations inside the layers and logits. A weight keeps the one it is stored in and is
    converted at use. The sum that runs through the layers stays in float32: it is small, and rounding it after every
    layer would cost more accuracy than bfloat16 does anywhere else.
    """

    def __init__(
        self,
        config: ModelConfig,
        heads: HeadPlan,
        dtype: torch.dtype,
        parameters: DecoderParameters,
        place: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        form: Form | None = None,
    ) -> None:
        """``place`` brings a host tensor to the device where ``parameters`` are; ``form`` is what that device wants."""
        super().__init__()
        self.form = form = form or Form()
        weights = Weights(parameters, form.make_linear)
        made_of, prefix = config.architecture, config.architecture.prefix
        self.vocab_size, self.dtype = config.vocab_size, dtype
        self.register_buffer("embedding", weights.take(prefix + EMBEDDING.name))  # [V, E], or of a width of its own
        learned = made_of.positions is Positions.LEARNED
        self.register_buffer("positions", weights.take(prefix + POSITIONS.name) if learned else None)
        self.position_offset = made_of.position_offset
        prefixes = [f"{prefix}layers.{layer}." for layer in range(config.num_layers)]
        self.layers = nn.ModuleList(Block(weights, name, config, heads, dtype, form) for name in prefixes)
        self.norm = make_norm(weights, prefix + made_of.final_norm, config, dtype) if made_of.final_norm else None
        self.project_in, self.project_out = (
            None if config.word_embed_proj_dim is None else weights.linear(prefix + row.name.removesuffix(".weight"))
            for row in (PROJECT_IN, PROJECT_OUT)
        )
        head = LM_HEAD.name.removesuffix(".weight")
        self.lm_head = self._tied_head() if config.tie_word_embeddings else weights.linear(head)
        weights.check_all_taken()
        frequencies = None
        if made_of.positions is Positions.ROTARY:
            frequencies = place(torch.tensor(inverse_frequencies(config), dtype=torch.float32))  # [D / 2]
        self.register_buffer("frequencies", frequencies)

    def _tied_head(self) -> nn.Module:
        """The output head over the embedding's own tensor."""
        dtype = str(self.embedding.dtype).removeprefix("torch.")
        return self.form.make_linear(LinearWeight(Floating(dtype), {"": self.embedding}))

    def forward(self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits [B, V] after the last of ``tokens`` [B, T], which take ``slots`` [T] of the cache.

        ``offsets`` [B] is the slot at which each row begins.
        """
        x = self._layers(tokens, slots, offsets, cache, cache.slots)[:, -1]  # [C * B, E]
        x = x.to(self.dtype) if self.norm is None else self.norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return self.lm_head(x)[: cache.batch_size, : self.vocab_size]  # the head is padded to all chips

    def fill(
        self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, cache: KVCache, first: bool = False
    ) -> torch.Tensor:
        """Process ``tokens`` into the cache; returns the last layer's output [B, T, E], float32.

        With ``first`` the slots are the cache's first T, and no others are looked at.
        """
        seen = tokens.shape[1] if first else cache.slots
        return self._layers(tokens, slots, offsets, cache, seen)[: cache.batch_size]

    def _layers(
        self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, cache: KVCache, seen: int
    ) -> torch.Tensor:
        """The last layer's output [C * B, T, E], with C copies of every row where ``least_rows`` asks for them."""
        turn = None if self.frequencies is None else self._turn(slots, offsets)
        places = torch.arange(seen, device=tokens.device)  # [S]
        # Padding before a row's begin would see no slot at all; its own slot keeps the softmax finite.
        begun = (places >= offsets[:, None])[:, None] | (places == slots[:, None])
        mask = begun & (places <= slots[:, None])  # [B, T, S]
        x = self._embed(tokens, slots, offsets, copies=-(-self.form.least_rows // tokens.numel()))
        for layer, block in enumerate(self.layers):
            x = block(x, turn, mask, slots, cache, layer)
        return x

    def _embed(self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, copies: int) -> torch.Tensor:
        """What goes into the first layer, [copies * B, T, E] in float32: tokens, and learned positions if there are."""
        x = nn.functional.embedding(torch.cat([tokens] * copies), self.embedding)
        if self.project_in is not None:
            x = self.project_in(x.to(self.dtype))
        x = x.float()
        if self.positions is None:
            return x
        positions = (slots[None] - offsets[:, None]).clamp(min=0)  # [B, T]; before a row's begin any will do
        learned = nn.functional.embedding(positions + self.position_offset, self.positions).float()
        return x + torch.cat([learned] * copies)

    def _turn(self, slots: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, T, D] of the rotary embedding (Su et al. 2021), in float32."""
        positions = (slots[None] - offsets[:, None]).float()  # [B, T]
        angles = positions[:, :, None] * self.frequencies  # [B, T, D / 2]
        angles = torch.cat([angles, angles], dim=-1)
        return self.form.keep(angles.cos()), self.form.keep(angles.sin())


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (i, i + D / 2) of the last axis: Hugging Face's order of rows."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)
