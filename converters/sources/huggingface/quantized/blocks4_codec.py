"""4-bit codes in blocks of a flattened weight, as bitsandbytes stores them: nf4 and fp4.

A byte holds two codes, the first in its upper half. A code stands for a number of the table ``quant_map``, times the
largest magnitude of its block, ``absmax``. With double quantization that is itself a code of 8 bits, of the table
``nested_quant_map``, times ``nested_absmax`` of its block, plus one number. A tensor of bytes has the sizes as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.console.errors import InputError, shown
from converters.sources.huggingface.quantized.codec import OnlyRows, need, only

if TYPE_CHECKING:
    import torch

    from converters.sources.huggingface.surplus import Held

TYPES = ("nf4", "fp4")  # the last is the default
STATE = "quant_state.bitsandbytes__"
_MOST_BYTES = 1 << 16  # of the JSON


class Magnitudes(NamedTuple):
    """Numbers of blocks of ``size``; with ``table``, codes of it that stand for numbers, times those of ``nested``."""

    size: int
    stored: Held
    table: torch.Tensor | None = None
    nested: Magnitudes | None = None
    added: float = 0.0

    def of(self, first: int, last: int) -> torch.Tensor:
        """Of elements [first, last), one for each: float32."""
        import torch

        begin = first // self.size
        blocks = self.stored.rows(begin, (last - 1) // self.size + 1)
        if self.table is not None:
            blocks = self.table[blocks.int()] * self.nested.of(begin, begin + len(blocks)) + self.added
        return blocks[torch.arange(first, last) // self.size - begin]


@dataclass
class Blocks4Codec(OnlyRows):
    """A weight in such codes: see ``Codec``."""

    name: str
    shape: tuple[int, int]
    kind: str
    codes: Held = field(repr=False)
    table: torch.Tensor = field(repr=False)
    magnitudes: Magnitudes = field(repr=False)

    @property
    def title(self) -> str:
        twice = "" if self.magnitudes.nested is None else ", double quantization"
        return f"{self.kind}, blocks of {self.magnitudes.size}{twice}"

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        first, last = start * self.shape[1], stop * self.shape[1]
        packed = self.codes.rows(first // 2, (last + 1) // 2).flatten()
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[first % 2 :][: last - first]
        return (self.table[codes.int()] * self.magnitudes.of(first, last)).view(stop - start, -1)

    @property
    def why(self) -> str:
        return f"no format here has the codes of {self.kind}"


def blocks4(name: str, shape: tuple[int, int], kind: str, tensors: Mapping[str, Held]) -> Blocks4Codec:
    """The codec of a weight in codes of ``kind``. Raises InputError for tensors that are not what it calls for."""
    elements, part = prod(shape), f"weight.{STATE}{kind}"
    state = _state(tensors, part, name, kind, shape)
    codes = need(tensors, "weight", name, (-(-elements // 2), 1), ("uint8",))
    table = need(tensors, "weight.quant_map", name, (16,), ("float32",)).whole()
    size = state["blocksize"]
    blocks, parts = -(-elements // size), ["weight", part, "weight.quant_map", "weight.absmax"]
    if "nested_blocksize" not in state:
        magnitudes = Magnitudes(size, need(tensors, "weight.absmax", name, (blocks,), ("float32",)))
    else:
        parts += ["weight.nested_absmax", "weight.nested_quant_map"]
        inner = state["nested_blocksize"]
        nested = Magnitudes(inner, need(tensors, parts[-2], name, (-(-blocks // inner),), ("float32",)))
        numbers = need(tensors, parts[-1], name, (256,), ("float32",)).whole()
        stored = need(tensors, "weight.absmax", name, (blocks,), ("uint8",))
        magnitudes = Magnitudes(size, stored, numbers, nested, state["nested_offset"])
    only(tensors, tuple(parts))
    return Blocks4Codec(name, shape, kind, codes, table, magnitudes)


def _state(tensors: Mapping[str, Held], part: str, name: str, kind: str, shape: tuple[int, int]) -> dict[str, Any]:
    """The JSON beside a weight. Raises InputError where it isn't there, is none, or describes another weight."""
    held = need(tensors, part, name, tensors[part].shape if part in tensors else (), ("uint8",))
    try:
        if prod(held.shape) > _MOST_BYTES:
            raise ValueError
        state = json.loads(bytes(held.whole().flatten().tolist()))
        sizes = [state["blocksize"], *([state["nested_blocksize"]] if "nested_blocksize" in state else [])]
        added = state.get("nested_offset", 0.0)
        sound = all(type(size) is int and size > 0 for size in sizes) and type(added) in (int, float)
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound or ("nested_blocksize" in state) != ("nested_offset" in state):
        raise InputError(f"{held.path}: the tensor {held.name} doesn't describe a weight. Fetch it again.")
    if state.get("quant_type") != kind or state.get("shape") != list(shape):
        raise InputError(
            f"{held.path}: {held.name} says {shown(state.get('quant_type'))} of shape {shown(state.get('shape'))}, but "
            f"config.json calls for {kind!r} of {list(shape)}."
        )
    return state
