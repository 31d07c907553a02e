"""The decoder as a plain module with fixed shapes, independent of any device; the architecture selects its parts.

Shapes: B rows, T tokens per call, S cache slots, H KV heads (over all chips), G query heads per KV head, D the head
dimension, E the hidden size, V the vocabulary.

Rows are aligned at their ends: all rows write the same slots, and a shorter row starts ``offsets[b]`` slots later. So
one index serves index_copy for the whole batch, and a token's position is its slot minus its row's offset.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from converters.model.config import ModelConfig
from converters.model.parameters import EMBEDDING, LM_HEAD, PROJECT_IN, PROJECT_OUT
from quantize.formats.floating import Floating
from quantize.shards.partition import HeadPlan
from runtime.model.decoder_tensors import DecoderParameters
from runtime.model.device_form import Form
from runtime.model.kv_cache import KVCache
from runtime.model.linears.linear import LinearWeight
from runtime.model.parts.attention_layer import AttentionLayer
from runtime.model.parts.feed_forward import FEED_FORWARD_KINDS
from runtime.model.parts.norms import make_norm
from runtime.model.parts.positions import POSITION_KINDS
from runtime.model.parts.rotary import Rotary
from runtime.model.weights import Weights


class Block(nn.Module):
    """One layer of the decoder: attention and feed-forward, each added to its input."""

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
        architecture = config.architecture
        self.norm_first, self.dtype = architecture.norm_first, dtype
        normed = dtype if self.norm_first else torch.float32  # a norm after the sum gives the next residual
        self.attention_norm = make_norm(weights, prefix + architecture.attention_norm, config, normed)
        self.attention = AttentionLayer(weights, prefix + "self_attn.", heads, config, form)
        self.feed_forward_norm = make_norm(weights, prefix + architecture.feed_forward_norm, config, normed)
        self.feed_forward = FEED_FORWARD_KINDS[architecture.feed_forward](weights, prefix, architecture, heads.chips)

    def forward(
        self,
        x: torch.Tensor,
        rotary: Rotary | None,
        mask: torch.Tensor,
        slots: torch.Tensor,
        cache: KVCache,
        layer: int,
    ) -> torch.Tensor:
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), rotary, mask, slots, cache, layer)
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = self.attention_norm(x + self.attention(x.to(self.dtype), rotary, mask, slots, cache, layer))
        return self.feed_forward_norm(x + self.feed_forward(x.to(self.dtype)))


class Embedding(nn.Module):
    """What comes before the layers: a table to look tokens up in, a projection from its width if any, and positions."""

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        dtype: torch.dtype,
        place: Callable[[torch.Tensor], torch.Tensor],
        form: Form,
    ) -> None:
        super().__init__()
        prefix, self.dtype = config.architecture.prefix, dtype
        self.register_buffer("table", weights.take(prefix + EMBEDDING.name))  # [V, E], or [V, word_embed_proj_dim]
        self.positions = POSITION_KINDS[config.architecture.positions](weights, config, place, form)
        projects = config.word_embed_proj_dim is not None
        self.project_in = weights.linear(prefix + PROJECT_IN.name.removesuffix(".weight")) if projects else None

    def forward(
        self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, copies: int = 1
    ) -> torch.Tensor:
        """The first layer's input, float32 [copies * B, T, E]: token embeddings, plus learned positions if any."""
        x = nn.functional.embedding(torch.cat([tokens] * copies), self.table)
        if self.project_in is not None:
            x = self.project_in(x.to(self.dtype))
        x, added = x.float(), self.positions.added(slots, offsets)
        return x if added is None else x + torch.cat([added] * copies)


def causal_mask(slots: torch.Tensor, offsets: torch.Tensor, seen: int) -> torch.Tensor:
    """Which of the cache's first ``seen`` slots S a token may attend to: [B, T, S], true for those of its row so far.

    Padding before a row's start would attend to none at all; its own slot keeps the softmax finite.
    """
    cached = torch.arange(seen, device=slots.device)  # [S]
    begun = (cached >= offsets[:, None])[:, None] | (cached == slots[:, None])
    return begun & (cached <= slots[:, None])


class Head(nn.Module):
    """What follows the layers: the final norm, the projection to the embedding's width if any, the output head."""

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        dtype: torch.dtype,
        form: Form,
        embedding: torch.Tensor | None = None,
    ) -> None:
        """``embedding`` is the tensor that the output head shares with it, where the model's are tied."""
        super().__init__()
        architecture, prefix = config.architecture, config.architecture.prefix
        self.vocab_size, self.dtype = config.vocab_size, dtype
        self.norm = (
            make_norm(weights, prefix + architecture.final_norm, config, dtype) if architecture.final_norm else None
        )
        projects = config.word_embed_proj_dim is not None
        self.project_out = weights.linear(prefix + PROJECT_OUT.name.removesuffix(".weight")) if projects else None
        if embedding is None:
            self.lm_head = weights.linear(LM_HEAD.name.removesuffix(".weight"))
        else:
            stored = str(embedding.dtype).removeprefix("torch.")
            self.lm_head = form.make_linear(LinearWeight(Floating(stored), {"": embedding}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] from the last layer's output [..., E], followed by those of the vocabulary's padding."""
        x = x.to(self.dtype) if self.norm is None else self.norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return self.lm_head(x)


class Decoder(nn.Module):
    """A model whose tensors are the shards for ``heads.chips`` chips, joined along their shard axes.

    ``dtype`` is that of the cache, the activations inside the layers and the logits. Weights keep their stored dtype
    and are converted where they are used. The residual stream stays in float32: it is small, and rounding it after
    every layer would cost more accuracy than bfloat16 does anywhere else.
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
        """``place`` moves a host tensor to the device that holds ``parameters``; ``form`` has that device's variants.

        Raises MissingTensor or UnexpectedTensor where ``parameters`` are not exactly the ones that the model needs.
        """
        super().__init__()
        self.form = form = form or Form()
        weights = Weights(parameters, form.make_linear)
        self.vocab_size, self.dtype = config.vocab_size, dtype
        self.embedding = Embedding(weights, config, dtype, place, form)
        prefixes = [f"{config.architecture.prefix}layers.{layer}." for layer in range(config.num_layers)]
        self.layers = nn.ModuleList(Block(weights, name, config, heads, dtype, form) for name in prefixes)
        self.head = Head(weights, config, dtype, form, self.embedding.table if config.tie_word_embeddings else None)
        weights.check_all_taken()

    def forward(self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits [B, V] after the last of ``tokens`` [B, T], which are written to ``slots`` [T] of the cache.

        ``offsets`` [B] is the slot at which each row starts.
        """
        x = self._layers(tokens, slots, offsets, cache, cache.slots)[:, -1]  # [C * B, E]
        return self.head(x)[: cache.batch_size, : self.vocab_size]

    def fill(
        self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, cache: KVCache, first: bool = False
    ) -> torch.Tensor:
        """Write ``tokens`` [B, T] to the cache at ``slots`` [T]; returns the last layer's output, float32 [B, T, E].

        With ``first`` the slots are the cache's first T, and only those are attended to.
        """
        seen = tokens.shape[1] if first else cache.slots
        return self._layers(tokens, slots, offsets, cache, seen)[: cache.batch_size]

    def fill_by_layer(
        self, tokens: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, cache: KVCache, first: bool = False
    ) -> list[torch.Tensor]:
        """``fill``, returning every layer's output, the first layer's first."""
        outputs: list[torch.Tensor] = []
        self._layers(tokens, slots, offsets, cache, tokens.shape[1] if first else cache.slots, outputs)
        return [x[: cache.batch_size] for x in outputs]

    def _layers(
        self,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        offsets: torch.Tensor,
        cache: KVCache,
        seen: int,
        outputs: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The last layer's output [C * B, T, E]; C copies of every row are made to reach the form's ``least_rows``.

        Every layer's output is appended to ``outputs``.
        """
        rotary = self.embedding.positions.rotary(slots, offsets)
        mask = causal_mask(slots, offsets, seen)  # [B, T, S]
        x = self.embedding(tokens, slots, offsets, copies=-(-self.form.least_rows // tokens.numel()))
        for layer, block in enumerate(self.layers):
            x = block(x, rotary, mask, slots, cache, layer)
            if outputs is not None:
                outputs.append(x)
        return x
