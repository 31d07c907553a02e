"""What a decoder needs from the machine it runs on. Two classes provide it: XLA chips (xla.py), the host (host.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from quantize.shards.chip_weights import ChipWeights
from runtime.devices.processes import Processes
from runtime.model.decoder_tensors import DecoderTensor
from runtime.model.device_form import Form
from runtime.model.kv_cache import KVCache


class CacheUse(NamedTuple):
    """Numbers of graphs whose programs the compile cache had, lacked, and had in vain: those were compiled anew."""

    hits: int
    misses: int
    failures: int


class Memory(NamedTuple):
    """The memory of the chips that this process feeds."""

    local_chips: int
    on_host: bool  # whether it is the host's
    free_bytes: int | None  # on the fullest of them; None where the host's account is the one, or there is none


class Backend(Protocol):
    """Tensors on a device, and functions compiled for it."""

    platform: str  # device and backend: "cpu/xla"
    chips: int  # number over which tensors are split; 1 where they are whole
    processes: Processes  # those that run together
    leader: bool  # whether this process writes the output for all of a multi-host slice
    steps_ahead: int  # decode steps to launch before reading the tokens of one; 0 where a launch waits for its end
    cache_type: type[KVCache]  # how a graph updates the cache
    form: Form  # this device's variants of parts of the computation
    fuse_bytes: int | None  # the most bytes per chip of a weight fused from several; None for no limit

    def check_files(self, shards: ChipWeights) -> None:
        """Raise InputError where a file that this process loads from is not there or isn't what the manifest says.

        No tensor is read.
        """
        ...

    def load(self, shards: ChipWeights, tensor: DecoderTensor) -> Any:
        """A tensor for a decoder to hold, joined over the chips. Raises InputError for missing files."""
        ...

    def nbytes(self, loaded: Any) -> int:
        """The bytes that a loaded tensor takes, on all chips where it is split over them, else on each."""
        ...

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor for a decoder to hold, copied whole to every chip."""
        ...

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, axis: int) -> Any:
        """Zeros on the device, split over the chips along ``axis``, as an input of compiled functions."""
        ...

    def replicate(self, tensor: torch.Tensor) -> Any:
        """A host tensor copied whole to every chip, as an input of compiled functions."""
        ...

    def fetch(self, tensor: Any) -> torch.Tensor:
        """A compiled function's result on the host. Waits for it."""
        ...

    def compile(
        self, function: Callable[..., Any], donates: int, exact: bool = False, name: str | None = None
    ) -> Callable[..., Any]:
        """``function`` of tensors and lists of them, compiled once per shape of its inputs.

        It takes, and gives, this backend's inputs and results, which need not be torch's tensors.
        The last results replace, in order, the tensors of the argument with index ``donates``. They may be written over
        those tensors, which must not be used again. With ``exact``, float32 matrix products are computed in float32
        even on a device that would round their inputs to bfloat16. ``name`` tells the function from all others of the
        session that the backend was started for; what has none is traced in every start.
        """
        ...

    def keep_recipes(self) -> None:
        """Have the next start of such a session know the graphs that were compiled so far, to load them ahead."""
        ...

    def wait(self) -> None:
        """Block until the device has finished all launched work."""
        ...

    def release(self) -> None:
        """Free what decoders hold. They can't be compiled any more."""
        ...

    def compilations(self) -> int:
        """Graphs compiled so far in this process."""
        ...

    def cache_use(self) -> CacheUse | None:
        """Use of the compile cache so far in this process; None where nothing is compiled."""
        ...

    def read_bandwidth(self) -> float:
        """Bytes per second at which all chips together read their memory, from a brief measurement."""
        ...

    def memory(self) -> Memory:
        """The chips' memory now."""
        ...

    def peak_bytes(self) -> int | None:
        """The most bytes of memory that one device has used; None where the device doesn't report it."""
        ...
