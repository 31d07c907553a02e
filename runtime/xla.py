"""The one module that touches torch_xla: devices, placing shards, compiling, counting compilations, memory.

XLA runs one SPMD program over all chips of a mesh with the single axis "tp" (tensor parallel). On the CPU the chips
are virtual. torch_xla reads its environment when it is imported, so XLABackend sets it first.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from converters.errors import InputError
from quantize.scheme import StoredTensor
from quantize.shards import Shards
from runtime.capture import capture
from runtime.kv_cache import FunctionalKVCache


class XLABackend:
    """The chips of a mesh as one XLA device under SPMD."""

    cache_type = FunctionalKVCache

    def __init__(self, chips: int) -> None:
        """Bring up XLA on ``chips`` chips: those of the TPU slice where there is one, else virtual ones on the CPU.

        Raises InputError where this machine's slice has another number of chips.
        """
        os.environ.setdefault("PJRT_DEVICE", "TPU" if _has_tpu() else "CPU")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA warns at every compilation that GSPMD will go
        kind = os.environ["PJRT_DEVICE"]
        if kind == "CPU":
            os.environ["CPU_NUM_DEVICES"] = str(chips)
        import torch_xla.runtime as xr

        xr.use_spmd()
        present = xr.global_runtime_device_count()
        if present != chips:
            raise InputError(
                f"The shards are for {chips} chips and this slice has {present}. Split them anew: llama-quantize "
                f"SHARDS --chips {present} --out OTHER, with the --int8 or --bf16 they were made with."
            )
        self.chips = chips
        self.platform = f"{kind.lower()}/xla"
        self.leader = xr.process_index() == 0

    @property
    def local_chips(self) -> list[int]:
        """The chips that this process feeds: all of them on one host, its own on a slice of several hosts."""
        from torch_xla import _XLAC

        return [_ordinal(name) for name in _XLAC._xla_get_runtime_devices()]

    def load(self, shards: Shards, stored: StoredTensor) -> torch.Tensor:
        """Each local chip's part, read from its file; no host ever puts the whole tensor together."""
        parts = [shards.local(stored.name, chip) for chip in self.local_chips]
        return self._place(parts, stored.parameter.row.shard)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, axis: int) -> torch.Tensor:
        local_shape = list(shape)
        local_shape[axis] //= self.chips
        part = torch.zeros(local_shape, dtype=dtype)
        return self._place([part] * len(self.local_chips), axis)

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._place([tensor] * len(self.local_chips), None)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` captured whole and compiled by XLA, once per shape of its inputs."""
        return capture(function, "openxla")

    def donate(self, tensors: Sequence[torch.Tensor]) -> None:
        from torch_xla import _XLAC

        for tensor in tensors:
            _XLAC._set_buffer_donation(tensor, True)

    def wait(self) -> None:
        """Wait until the chips have done all that was asked of them."""
        import torch_xla.core.xla_model as xm

        xm.wait_device_ops()

    def compilations(self) -> int:
        """Graphs compiled so far in this process."""
        import torch_xla.debug.metrics as metrics

        data = metrics.metric_data("CompileTime")
        return data[0] if data else 0

    def peak_bytes(self) -> int | None:
        """The most memory that one chip has used, where PJRT tells."""
        import torch_xla
        import torch_xla.core.xla_model as xm

        try:
            info = xm.get_memory_info(str(torch_xla.device()))
        except RuntimeError:  # the CPU client keeps no account
            return None
        return info.get("peak_bytes_used") or None

    def _place(self, parts: Sequence[torch.Tensor], axis: int | None) -> torch.Tensor:
        """The local chips' parts, in the order of ``local_chips``, as one tensor split on ``axis`` (None: copies)."""
        import numpy as np
        import torch_xla.distributed.spmd as xs
        from torch_xla import _XLAC

        shape = list(parts[0].shape)
        if axis is not None:
            shape[axis] *= self.chips
        mesh = xs.Mesh(np.arange(self.chips), (self.chips,), ("tp",))
        sharding = mesh.get_op_sharding(tuple("tp" if d == axis else None for d in range(len(shape))))
        return _XLAC._global_tensor_from_cpu_shards([part.contiguous() for part in parts], sharding, shape)


def _ordinal(device_name: str) -> int:
    """``TPU:3`` -> 3."""
    return int(device_name.rsplit(":", 1)[1])


def _has_tpu() -> bool:
    """Whether this machine has a TPU's device files (the kernel's accel driver, or vfio with Google's vendor id)."""
    if glob.glob("/dev/accel*"):
        return True
    for path in glob.glob("/sys/bus/pci/devices/*/vendor"):
        with open(path) as file:
            if file.read().strip() == "0x1ae0" and glob.glob("/dev/vfio/[0-9]*"):
                return True
    return False


def lazy_device() -> torch.device:
    """One XLA device as LazyTensor gives it out of the box: no SPMD, and every step traced anew."""
    os.environ.setdefault("PJRT_DEVICE", "TPU" if _has_tpu() else "CPU")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import torch_xla

    return torch_xla.device()


def lazy_sync() -> None:
    """Compile and run what has been traced on ``lazy_device``, and wait for it."""
    import torch_xla

    torch_xla.sync(wait=True)


def lazy_compilations() -> int:
    """Graphs compiled so far in this process for ``lazy_device``."""
    import torch_xla.debug.metrics as metrics

    data = metrics.metric_data("CompileTime")
    return data[0] if data else 0
