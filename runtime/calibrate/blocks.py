"""A source's layers, made one at a time on the host in float32; their weights are read when they are multiplied.

Shapes: N windows, B of them at once, T tokens each, E the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from converters.files.row_blocks import row_blocks
from converters.model.config import ModelConfig
from converters.model.parameters import EMBEDDING, parameters
from converters.sources.source import TensorSource
from quantize.shards.chip_weights import Unquantized
from quantize.shards.partition import plan_heads
from runtime.devices.cpu.attention import attend_fused
from runtime.model.decoder import Block, Embedding, causal_mask
from runtime.model.decoder_tensors import DecoderTensor, collect, decoder_parameters
from runtime.model.device_form import Form
from runtime.model.kv_cache import KVCache
from runtime.model.linears.linear import LinearWeight
from runtime.model.weights import Weights

_BLOCK_ELEMENTS = 1 << 24  # of a weight's rows at once: 64 MB in float32


@dataclass(frozen=True)
class SourceWeight:
    """A linear's weight [out, in] that stays where it is."""

    name: str
    shape: tuple[int, int]
    source: TensorSource

    def blocks(self, elements: int = _BLOCK_ELEMENTS) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Rows [start, stop) in float32, one range of about so many ``elements`` after the other."""
        for start, stop in row_blocks(0, *self.shape, elements):
            yield start, stop, self.source.rows(self.name, start, stop).float()


class StreamedLinear(nn.Module):
    """y = x W^T for x [..., in] and a weight in its source. ``seen`` is told the weight's name and x, if given."""

    def __init__(self, weight: SourceWeight, seen: Callable[[str, torch.Tensor], None] | None = None) -> None:
        super().__init__()
        self.weight, self.seen = weight, seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            self.seen(self.weight.name, x)
        y = x.new_empty(*x.shape[:-1], self.weight.shape[0])
        for start, stop, rows in self.weight.blocks():
            y[..., start:stop] = x @ rows.T
        return y


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
        self._embedding: Embedding | None = None
        self._rotary_and_mask: tuple[object, torch.Tensor] | None = None

    @torch.no_grad()
    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """The first layer's input, float32 [N, T, E], for tokens [N, T]; only their rows of the embedding are kept."""
        used, places = windows.unique(return_inverse=True)
        embedding = self._make_embedding(used)
        return embedding(places, self._slots, self._offsets.expand(len(windows)))

    @torch.no_grad()
    def layer(self, number: int, make_linear: MakeStreamed) -> Layer:
        """The layer, with linears made by ``make_linear``. It takes any number of windows at once."""
        prefix = f"{self.config.architecture.prefix}layers.{number}."
        weights = self._weights(lambda name: name.startswith(prefix), make_linear)
        form = Form(lambda weight: make_linear(weight.values), attend_many=attend_fused)
        block = Block(weights, prefix, self.config, self._heads, torch.float32, form)
        weights.check_all_taken()
        rotary, mask = self._positions()

        @torch.no_grad()
        def run(x: torch.Tensor) -> torch.Tensor:
            rows = len(x)
            shape = (rows, self._heads.kv_places, len(self._slots), self.config.head_dim)
            cache = KVCache([[torch.zeros(shape), torch.zeros(shape)]])
            return block(x, rotary, mask.expand(rows, -1, -1), self._slots, cache, 0)

        return run

    def weight_names(self, number: int) -> list[str]:
        """The weights of the layer's linears, in the order of the files."""
        prefix = f"{self.config.architecture.prefix}layers.{number}."
        return [each.name for each in self._parameters if each.name.startswith(prefix) and each.is_linear]

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
        form = Form(lambda weight: StreamedLinear(weight.values))
        return Embedding(weights, self.config, torch.float32, lambda tensor: tensor, form)

    def _rows(self, name: str, wanted: torch.Tensor) -> torch.Tensor:
        """The rows ``wanted``, ascending, of a tensor, in float32."""
        count, width = next((each.shape[0], each.width) for each in parameters(self.config) if each.name == name)
        found = []
        for start, stop in row_blocks(0, count, width):
            here = wanted[(wanted >= start) & (wanted < stop)]
            if len(here):
                found.append(self._source.rows(name, start, stop)[here - start].float())
        return torch.cat(found)

    def _weights(
        self, wanted: Callable[[str], bool], make_linear: MakeStreamed, known: dict[str, torch.Tensor] | None = None
    ) -> Weights:
        known = known or {}

        def load(tensor: DecoderTensor) -> torch.Tensor | SourceWeight:
            [part] = tensor.parts
            if part.name in known:
                return known[part.name]
            if tensor.is_weight:
                return SourceWeight(part.name, part.shape, self._source)
            return self._source.rows(part.name, 0, part.shape[0]).float()

        held = collect([each for each in self._parameters if wanted(each.name)], load)
        return Weights(held, lambda weight: make_linear(_values(weight)))


def _values(weight: LinearWeight) -> SourceWeight:
    return weight.values
