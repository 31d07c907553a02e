"""The decoder on the host's CPU or CUDA device: the same shards joined again, eager or compiled by Inductor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.shards.chip_weights import ChipWeights
from runtime.devices.backend import CacheUse, Memory
from runtime.devices.bandwidth import measure_read_bandwidth
from runtime.devices.capture import capture
from runtime.devices.compile_cache import check_folder
from runtime.devices.cpu.attention import attend_fused
from runtime.devices.cpu.process import keep_freed_memory, prepare_cpu_process
from runtime.devices.processes import Processes
from runtime.model.decoder_tensors import DecoderTensor
from runtime.model.device_form import Form
from runtime.model.kv_cache import KVCache
from runtime.model.linears.linear import LinearWeight
from runtime.model.linears.packed_int4 import PackedInt4, kernel_group, pack_int4
from runtime.model.linears.table import Device, Layout, linear_kind, make_linear


class HostBackend:
    """One device holding whole tensors. ``mode`` is ``eager`` or ``inductor``."""

    chips = 1
    leader = True
    processes = Processes()
    cache_type = KVCache
    fuse_bytes = None
    steps_ahead = 0  # on a CPU a call returns when the step is done; on CUDA, reading waits for all launched work

    def __init__(self, mode: str, compile_cache: Path | None = None, int8_activations: bool = False) -> None:
        """``compile_cache`` is the folder in which Inductor keeps its kernels; by default, torch chooses one. With
        ``int8_activations`` weights that allow it are multiplied by activations in int8.

        Raises InputError for a folder that others can write to.
        """
        if compile_cache is not None:
            check_folder(compile_cache, needs_writing=True)  # Inductor's files are run as well
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compile_cache.absolute())
        self._mode, self._int8_activations = mode, int8_activations
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":
            prepare_cpu_process()
            keep_freed_memory()
        self.platform = f"{self._device.type}/{mode}"
        # On CUDA, Inductor fuses the weight's conversion into the product without help.
        self._kind = Device.INDUCTOR_CPU if self.platform == "cpu/inductor" else Device.ANY
        on_cpu = Form(self._make_linear, attend_many=attend_fused)
        self.form = on_cpu if self._device.type == "cpu" else Form(self._make_linear)

    def check_files(self, shards: ChipWeights) -> None:
        shards.check(range(shards.chips))

    def load(self, shards: ChipWeights, tensor: DecoderTensor) -> torch.Tensor | PackedInt4:
        parts = [shards.rows(part.name, 0, part.shape[0]) for part in tensor.parts]
        joined = tensor.join(parts).to(self._device)
        layout = linear_kind(tensor.format, self._kind, self._int8_activations).layout
        if tensor.are_values and layout is Layout.PACKED_INT4:
            groups = tensor.groups(shards.config, chips=1)
            return pack_int4(joined) if kernel_group(joined.shape[1], groups) else joined
        return joined

    def nbytes(self, loaded: torch.Tensor | PackedInt4) -> int:
        return loaded.nbytes

    def _make_linear(self, weight: LinearWeight) -> nn.Module:
        return make_linear(weight, self._kind, int8_activations=self._int8_activations)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, axis: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._device)

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)

    hold = replicate

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    def compile(
        self, function: Callable[..., Any], donates: int, exact: bool = False, name: str | None = None
    ) -> Callable[..., Any]:
        """``exact`` has no effect: PyTorch computes float32 products exactly by default, on CUDA too."""
        return function if self._mode == "eager" else capture(function, "inductor")

    def keep_recipes(self) -> None:
        """Do nothing: Inductor's cache finds its graphs by Dynamo's capture alone."""

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def release(self) -> None:
        """Do nothing: tensors are freed with the last reference to them."""

    def compilations(self) -> int:
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    def cache_use(self) -> CacheUse | None:
        if self._mode == "eager":
            return None
        from torch._dynamo.utils import counters

        found = counters["inductor"]
        return CacheUse(found["fxgraph_cache_hit"], found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"], 0)

    def read_bandwidth(self) -> float:
        return measure_read_bandwidth(self._device)

    def memory(self) -> Memory:
        if self._device.type == "cpu":
            return Memory(1, True, None)
        return Memory(1, False, torch.cuda.mem_get_info()[0])

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None
