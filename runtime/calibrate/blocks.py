"""A source's layers, made one at a time on the host in float32; their weights are read when they are multiplied.

Shapes: N windows, B of them at once, T tokens each, E the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from converters.files.row_blocks import row_blocks
from converters.model.config import ModelConfig
from converters.model.parameters import EMBEDDING, LM_HEAD, parameters
from converters.sources.source import TensorSource
from quantize.formats.floating import Floating
from quantize.shards.chip_weights import Unquantized
from quantize.shards.partition import plan_heads
from runtime.devices.cpu.attention import attend_fused
from runtime.model.decoder import Block, Embedding, Head, causal_mask
from runtime.model.decoder_tensors import DecoderTensor, collect, decoder_parameters
from runtime.model.device_form import Form
from runtime.model.kv_cache import KVCache
from runtime.model.linears.linear import LinearWeight, as_it_is
from runtime.model.weights import Weights

_BLOCK_ELEMENTS = 1 << 24  # of a weight's rows at once: 64 MB in float32, enough to be worth a column's operations


@dataclass(frozen=True)
class SourceWeight:
    """A linear's weight [out, in] that stays where it is."""

    name: str
    shape: tuple[int, int]
    source: TensorSource

    def blocks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Rows [start, stop) in float32, one range after the other."""
        for start, stop in row_blocks(0, *self.shape, _BLOCK_ELEMENTS):
            yield start, stop, self.source.rows(self.name, start, stop).float()


Seen = Callable[[str, torch.Tensor], None]  # told a weight's name, and what it is given or what is asked of it


class StreamedLinear(nn.Module):
    """y = x W^T for x [..., in] and a weight in its source. ``seen`` is told x; where gradients are computed,
    ``seen_gradient`` that by y.
    """

    def __init__(self, weight: SourceWeight, seen: Seen | None = None, seen_gradient: Seen | None = None) -> None:
        super().__init__()
        self.weight, self.seen, self.seen_gradient = weight, seen, seen_gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            self.seen(self.weight.name, x)
        return _StreamedProduct.apply(x, self.weight, self.seen_gradient)


class _StreamedProduct(torch.autograd.Function):
    """The product, whose weight is read again for the gradient by x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: SourceWeight, seen: Seen | None) -> torch.Tensor:
        ctx.weight, ctx.seen = weight, seen
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for start, stop, rows in weight.blocks():
            y[..., start:stop] = x @ rows.T
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.seen is not None:
            ctx.seen(ctx.weight.name, gradient)
        found = gradient.new_zeros(*gradient.shape[:-1], ctx.weight.shape[1])
        for start, stop, rows in ctx.weight.blocks():
            found += gradient[..., start:stop] @ rows
        return found, None, None


MakeStreamed = Callable[[SourceWeight], nn.Module]
Layer = Callable[[torch.Tensor], torch.Tensor]  # from a layer's input, float32 [B, T, E], to its output


class Blocks:
    """The layers of a source's model for windows of ``length`` tokens."""

    def __init__(self, source: TensorSource, config: ModelConfig, length: int) -> None:
        """``config`` is the source's own, possibly cut to fewer layers."""
        self._source, self.config = source, config
        self._heads = plan_heads(config.num_heads, config.num_kv_heads, chips=1)
        stored = Unquantized(config.dtype)
        self._parameters = decoder_parameters(config, stored, chips=1, fuse_bytes=0)
        self._slots, self._offsets = torch.arange(length), torch.zeros(1, dtype=torch.long)
        self._rotary_and_mask: tuple[object, torch.Tensor] | None = None

    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """The first layer's input, float32 [N, T, E], for tokens [N, T]; only their rows of the embedding are kept."""
        used, places = windows.unique(return_inverse=True)
        embedding = self._make_embedding(used)
        return embedding(places, self._slots, self._offsets.expand(len(windows)))

    def layer(self, number: int, make_linear: MakeStreamed) -> Layer:
        """The layer, with linears made by ``make_linear``. It takes any number of windows at once."""
        prefix = f"{self.config.architecture.prefix}layers.{number}."
        weights = self._weights(lambda name: name.startswith(prefix), make_linear)
        block = Block(weights, prefix, self.config, self._heads, torch.float32, Form(attend_many=attend_fused))
        weights.check_all_taken()
        rotary, mask = self._positions()

        def run(x: torch.Tensor) -> torch.Tensor:
            rows = len(x)
            shape = (rows, self._heads.kv_places, len(self._slots), self.config.head_dim)
            cache = KVCache([[torch.zeros(shape), torch.zeros(shape)]])
            return block(x, rotary, mask.expand(rows, -1, -1), self._slots, cache, 0)

        return run

    def head(self) -> nn.Module:
        """From the last layer's output, float32 [..., E], to the logits [..., V]."""
        prefix, inside = self.config.architecture.prefix, f"{self.config.architecture.prefix}layers."
        names = [each.name for each in self._parameters]
        last = max(place for place, name in enumerate(names) if name.startswith(inside))
        wanted, known = set(names[last + 1 :]), {}
        head = LM_HEAD.name
        if self.config.tie_word_embeddings:
            known[head] = SourceWeight(prefix + EMBEDDING.name, self._shape(prefix + EMBEDDING.name), self._source)
        weights = self._weights(wanted.__contains__, StreamedLinear, tied=known)
        return Head(weights, self.config, torch.float32, Form())

    def _shape(self, name: str) -> tuple[int, int]:
        return next(each.shape for each in parameters(self.config) if each.name == name)

    def _positions(self) -> tuple[object, torch.Tensor]:
        if self._rotary_and_mask is None:
            embedding = self._make_embedding(torch.zeros(1, dtype=torch.long))
            rotary = embedding.positions.rotary(self._slots, self._offsets)
            self._rotary_and_mask = rotary, causal_mask(self._slots, self._offsets, len(self._slots))
        return self._rotary_and_mask

    def _make_embedding(self, used: torch.Tensor) -> Embedding:
        """The embedding with only the rows ``used``, in ascending order."""
        prefix, inside = self.config.architecture.prefix, f"{self.config.architecture.prefix}layers."
        before = [each.name for each in parameters(self.config)]
        first = next((place for place, name in enumerate(before) if name.startswith(inside)), len(before))
        names = set(before[:first])
        table = {prefix + EMBEDDING.name: self._rows(prefix + EMBEDDING.name, used)}
        weights = self._weights(names.__contains__, StreamedLinear, table)
        return Embedding(weights, self.config, torch.float32, as_it_is, Form())

    def _rows(self, name: str, wanted: torch.Tensor) -> torch.Tensor:
        """The rows ``wanted``, ascending, of a tensor, in float32."""
        found = []
        for start, stop in row_blocks(0, *self._shape(name)):
            here = wanted[(wanted >= start) & (wanted < stop)]
            if len(here):
                found.append(self._source.rows(name, start, stop)[here - start].float())
        return torch.cat(found)

    def _weights(
        self,
        wanted: Callable[[str], bool],
        make_linear: MakeStreamed,
        known: Mapping[str, torch.Tensor] | None = None,
        tied: Mapping[str, SourceWeight] | None = None,
    ) -> Weights:
        """The parameters of these names, but for tensors that are ``known``, and ``tied`` ones beside them."""
        known = known or {}

        def load(tensor: DecoderTensor) -> torch.Tensor | SourceWeight:
            [part] = tensor.parts
            if part.name in known:
                return known[part.name]
            if tensor.is_weight:
                return SourceWeight(part.name, part.shape, self._source)
            return self._source.rows(part.name, 0, part.shape[0]).float()

        held = dict(collect([each for each in self._parameters if wanted(each.name)], load))
        for name, weight in (tied or {}).items():
            held[name] = LinearWeight(Floating(self.config.dtype), {"": weight})
        return Weights(held, lambda weight: make_linear(weight.values))
