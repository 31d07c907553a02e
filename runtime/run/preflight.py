"""What a run needs of memory, on the chips and on this host, said and checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from converters.console.errors import InputError
from converters.console.notes import note
from converters.console.units import format_bytes, plural
from converters.model.config import ModelConfig
from converters.output.preflight import available_memory
from quantize.shards.scheme import Scheme
from runtime.devices.backend import Backend
from runtime.model.sizing import cache_bytes_per_chip, parameter_bytes_per_chip


@dataclass(frozen=True)
class Needs:
    """Bytes on each chip; a program's temporaries come on top."""

    parameters: int
    cache: int

    @classmethod
    def of(
        cls, config: ModelConfig, scheme: Scheme, chips: int, batch_size: int, max_seq_len: int, dtype: torch.dtype
    ) -> Needs:
        """``dtype`` is that of the cache."""
        return cls(
            parameter_bytes_per_chip(config, scheme, chips),
            cache_bytes_per_chip(config, chips, batch_size, max_seq_len, str(dtype).removeprefix("torch.")),
        )

    @property
    def total(self) -> int:
        return self.parameters + self.cache


_ADVICE = "Give --layers, a smaller --batch-size or --max-seq-len, or shards of a smaller format or for more chips."


def check_memory(needs: Needs, backend: Backend, advice: str = _ADVICE) -> None:
    """Note what the run needs and what is free. Raises InputError, with ``advice``, where it doesn't fit."""
    memory = backend.memory()
    free, place = (available_memory(), "of this host") if memory.on_host else (memory.free_bytes, "on each chip")
    needed = needs.total * (memory.local_chips if memory.on_host else 1)
    parts = f"{format_bytes(needs.parameters)} of parameters and {format_bytes(needs.cache)} of KV cache"
    each = f"{plural(memory.local_chips, 'chip')} with {parts} each" if memory.on_host else parts
    if free is not None and needed > free:
        raise InputError(f"{each} take {format_bytes(needed)} {place}, where {format_bytes(free)} are free. {advice}")
    of_free = "" if free is None else f" of {format_bytes(free)} that are free"
    note(f"Memory {place}: {format_bytes(needed)}{of_free} ({each}), and a program's temporaries.")
