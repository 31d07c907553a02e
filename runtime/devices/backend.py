"""What a decoder needs of the machine it runs on. Two kinds fulfil it: XLA chips (xla.py) and the host (host.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from quantize.shards.reading import Shards
from runtime.model.decoder_tensors import DecoderTensor
from runtime.model.device_form import Form
from runtime.model.kv_cache import KVCache


class CacheUse(NamedTuple):
    """Compiled graphs that were loaded from the compile cache, that it didn't hold, and that it couldn't load."""

    hits: int
    misses: int
    failures: int


class Backend(Protocol):
    """Tensors on a device, and functions compiled for it."""

    platform: str  # device and backend: "cpu/xla"
    chips: int  # over which tensors are split; 1 where they are whole
    leader: bool  # whether this process speaks for all of a multi-host slice
    steps_ahead: int  # decode steps to launch before the tokens of one are read; 0 where launching waits for the end
    cache_type: type[KVCache]  # how a graph updates the cache
    form: Form  # what of the computation is fast there in another form
    fuse_bytes: int | None  # of a weight that is put together from several; None where no size is too large

    def load(self, shards: Shards, tensor: DecoderTensor) -> torch.Tensor:
        """A tensor on the device, put together over the chips. Raises InputError for missing files."""
        ...

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, axis: int) -> torch.Tensor:
        """A tensor of zeros on the device, split over the chips along ``axis``."""
        ...

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor, whole on every chip."""
        ...

    def compile(self, function: Callable[..., Any], donates: int, exact: bool = False) -> Callable[..., Any]:
        """``function`` of tensors and lists of them, compiled once per shape of its inputs.

        The last results replace the tensors of the argument at place ``donates``, each that in its place, and may be
        written over them: they are not to be used again. With ``exact``, matrix products of float32 are computed as
        such, also where the device would round what goes into them to bfloat16.
        """
        ...

    def wait(self) -> None:
        """Return when the device has done all that was asked of it."""
        ...

    def compilations(self) -> int:
        """Graphs compiled so far in this process."""
        ...

    def cache_use(self) -> CacheUse | None:
        """How the compile cache did so far; None where nothing is compiled."""
        ...

    def read_bandwidth(self) -> float:
        """Bytes per second at which all chips together read their memory, measured for a moment."""
        ...

    def peak_bytes(self) -> int | None:
        """The most memory that one device has used; None where it keeps no account."""
        ...
