"""The decoder as a plain module of fixed shapes, which knows no device; its parts are those of an architecture.

Shapes: B rows, T tokens of one call, S slots of the cache, H KV heads (over all chips), G query heads under each, D the
head dimension, E the hidden size, V the vocabulary.

Rows are aligned at their ends: all rows write the same slots, and a shorter row begins ``offsets[b]`` slots later. So
one index serves index_copy for the whole batch, and a row's position is its slot minus its offset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from converters.architecture import FeedForward, Norm, Positions
from converters.config import ModelConfig
from converters.errors import MissingTensor, UnexpectedTensor
from converters.layout import EMBEDDING, LM_HEAD, POSITIONS, PROJECT_IN, PROJECT_OUT
from converters.rope import inverse_frequencies
from quantize.partition import HeadPlan
from runtime.kv_cache import KVCache
from runtime.linear import Linear, MakeLinear


class Weights:
    """Tensors by their name in the shards, each to be taken once, under names that grow with the module tree."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], make_linear: MakeLinear) -> None:
        self._left, self._make_linear = dict(tensors), make_linear

    def take(self, name: str) -> torch.Tensor:
        if name not in self._left:
            raise MissingTensor(f"The shards lack the tensor {name}, which the decoder needs.")
        return self._left.pop(name)

    def linear(self, name: str, bias: bool = False) -> nn.Module:
        """The linear ``name``.weight, quantized where there is a scale beside it; with ``bias`` it has one."""
        weight = f"{name}.weight"
        linear = self._make_linear(self.take(weight), self._left.pop(weight + "_scale", None))
        return Biased(linear, self.take(f"{name}.bias")) if bias else linear

    def norm(self, name: str, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
        """The normalization ``name``, given out in ``dtype``."""
        if config.architecture.norm is Norm.RMS:
            return RMSNorm(self.take(f"{name}.weight"), config.norm_eps, dtype)
        learned = ("weight", "bias") if config.architecture.norm_weights else ()
        return LayerNorm(config.norm_eps, dtype, *(self.take(f"{name}.{part}") for part in learned))

    def check_all_taken(self) -> None:
        for name in self._left:
            raise UnexpectedTensor(f"The shards hold the tensor {name}, which the decoder has no use for.")


class Biased(nn.Module):
    """A linear of any form, and the bias [out] that is added to what it gives: on every chip, or once to their sum."""

    def __init__(self, linear: nn.Module, bias: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y + self.bias.to(y.dtype)


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang & Sennrich 2019) of float32 [..., E], given out in ``dtype``."""

    def __init__(self, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.dtype = eps, dtype
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.weight.float()).to(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016) of float32 [..., E], given out in ``dtype``; weight and bias may be none."""

    def __init__(
        self, eps: float, dtype: torch.dtype, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.eps, self.dtype = eps, dtype
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            x = x * self.weight.float() + self.bias.float()
        return x.to(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention over the cache, query heads laid out under their KV heads."""

    def __init__(self, weights: Weights, prefix: str, heads: HeadPlan, config: ModelConfig) -> None:
        super().__init__()
        self.kv_heads, self.group, self.head_dim = heads.kv_slots, heads.group, config.head_dim
        biases = config.architecture.biases
        self.q_proj = weights.linear(prefix + "q_proj", biases)
        self.k_proj = weights.linear(prefix + "k_proj", biases)
        self.v_proj = weights.linear(prefix + "v_proj", biases)
        self.o_proj = weights.linear(prefix + config.architecture.attention_out, biases)

    def forward(
        self,
        x: torch.Tensor,  # [B, T, E]
        turn: tuple[torch.Tensor, torch.Tensor] | None,  # cos and sin, [B, T, D], of rotary positions
        mask: torch.Tensor,  # [B, T, S], true where a token may look
        slots: torch.Tensor,  # [T]
        cache: KVCache,
        layer: int,
    ) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.kv_heads, self.group, self.head_dim)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        if turn is not None:
            cos, sin = turn
            q = _rotate(q, cos[:, :, None, None], sin[:, :, None, None])
            k = _rotate(k, cos[:, :, None], sin[:, :, None])
        keys, values, *scales = cache.update(layer, slots, k.transpose(1, 2), v.transpose(1, 2))  # [B, H, S, D]
        # Scores and weights in float32: in bfloat16 their rounding would be the largest error of the whole layer.
        scores = torch.einsum("bthgd,bhsd->bhgts", q.float(), keys.float()) * self.head_dim**-0.5
        if scales:  # of an int8 cache; applied to scores and weights, S of each, not to S * D cached values
            key_scale, value_scale = (scale.squeeze(-1)[:, :, None, None] for scale in scales)  # [B, H, 1, 1, S]
            scores = scores * key_scale
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        weights = scores.softmax(-1) * value_scale if scales else scores.softmax(-1)
        y = torch.einsum("bhgts,bhsd->bthgd", weights, values.float()).to(x.dtype)
        return self.o_proj(y.reshape(batch, length, -1))


class SwiGLU(nn.Module):
    """The gated feed-forward layer (Shazeer 2020)."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class ReLU(nn.Module):
    """The feed-forward layer of the first Transformer (Vaswani et al. 2017)."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.relu(self.up(x)))


_FEED_FORWARD = {FeedForward.SWIGLU: SwiGLU, FeedForward.RELU: ReLU}


class Block(nn.Module):
    """One layer of the decoder: attention and feed-forward layer, each added to what goes in."""

    def __init__(self, weights: Weights, prefix: str, config: ModelConfig, heads: HeadPlan, dtype: torch.dtype) -> None:
        super().__init__()
        made_of = config.architecture
        self.norm_first, self.dtype = made_of.norm_first, dtype
        normed = dtype if self.norm_first else torch.float32  # behind the sums, norms give the next layer's input
        self.attention_norm = weights.norm(prefix + made_of.attention_norm, config, normed)
        self.attention = Attention(weights, prefix + "self_attn.", heads, config)
        self.feed_forward_norm = weights.norm(prefix + made_of.feed_forward_norm, config, normed)
        linears = (*made_of.feed_forward_in, made_of.feed_forward_out)
        self.feed_forward = _FEED_FORWARD[made_of.feed_forward](
            *(weights.linear(prefix + name, made_of.biases) for name in linears)
        )

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
        tensors: Mapping[str, torch.Tensor],
        place: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        make_linear: MakeLinear = Linear,
    ) -> None:
        """``place`` brings a host tensor to the device where ``tensors`` are; ``make_linear`` is that device's form."""
        super().__init__()
        weights = Weights(tensors, make_linear)
        made_of, prefix = config.architecture, config.architecture.prefix
        self.vocab_size, self.dtype = config.vocab_size, dtype
        self.register_buffer("embedding", weights.take(prefix + EMBEDDING.name))  # [V, E], or of a width of its own
        learned = made_of.positions is Positions.LEARNED
        self.register_buffer("positions", weights.take(prefix + POSITIONS.name) if learned else None)
        self.position_offset = made_of.position_offset
        self.layers = nn.ModuleList(
            Block(weights, f"{prefix}layers.{layer}.", config, heads, dtype) for layer in range(config.num_layers)
        )
        self.norm = weights.norm(prefix + made_of.final_norm, config, dtype) if made_of.final_norm else None
        self.project_in, self.project_out = (
            None if config.word_embed_proj_dim is None else weights.linear(prefix + row.name.removesuffix(".weight"))
            for row in (PROJECT_IN, PROJECT_OUT)
        )
        head = LM_HEAD.name.removesuffix(".weight")
        self.lm_head = make_linear(self.embedding, None) if config.tie_word_embeddings else weights.linear(head)
        weights.check_all_taken()
        frequencies = None
        if made_of.positions is Positions.ROTARY:
            frequencies = place(torch.tensor(inverse_frequencies(config), dtype=torch.float32))  # [D / 2]
        self.register_buffer("frequencies", frequencies)

    def forward(self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits [B, V] after the last of ``tokens`` [B, T], which take ``slots`` [T] of the cache.

        ``offsets`` [B] is the slot at which each row begins.
        """
        x = self.fill(tokens, slots, offsets, cache)[:, -1]  # [B, E]
        x = x.to(self.dtype) if self.norm is None else self.norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return self.lm_head(x)[:, : self.vocab_size]  # rows of the head beyond are padding

    def fill(self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Process ``tokens`` into the cache; returns the last layer's output [B, T, E], float32."""
        turn = None if self.frequencies is None else self._turn(slots, offsets)
        places = torch.arange(cache.slots, device=tokens.device)  # [S]
        # Padding before a row's begin would see no slot at all; its own slot keeps the softmax finite.
        begun = (places >= offsets[:, None])[:, None] | (places == slots[:, None])
        mask = begun & (places <= slots[:, None])  # [B, T, S]
        x = self._embed(tokens, slots, offsets)
        for layer, block in enumerate(self.layers):
            x = block(x, turn, mask, slots, cache, layer)
        return x

    def _embed(self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """What goes into the first layer, [B, T, E] in float32: tokens, and learned positions where there are some."""
        x = nn.functional.embedding(tokens, self.embedding)
        if self.project_in is not None:
            x = self.project_in(x.to(self.dtype))
        x = x.float()
        if self.positions is None:
            return x
        positions = (slots[None] - offsets[:, None]).clamp(min=0)  # [B, T]; before a row's begin any will do
        return x + nn.functional.embedding(positions + self.position_offset, self.positions).float()

    def _turn(self, slots: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, T, D] of the rotary embedding (Su et al. 2021), in float32."""
        positions = (slots[None] - offsets[:, None]).float()  # [B, T]
        angles = positions[:, :, None] * self.frequencies  # [B, T, D / 2]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (i, i + D / 2) of the last axis: Hugging Face's order of rows."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)
