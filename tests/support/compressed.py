"""Linears in the layouts of compressed-tensors, as the library itself writes and reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from quantized import Stored, grid

GROUPED = {"strategy": "group", "group_size": 32}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int-quantized", {}),
    "int8-tensor": ("int-quantized", {"strategy": "tensor"}),
    "int4-in-int8-g32": ("int-quantized", {"num_bits": 4} | GROUPED),
    "int8-g32": ("int-quantized", GROUPED),
    "int8-g32-zp": ("int-quantized", GROUPED | {"symmetric": False}),
    "naive": ("naive-quantized", {"symmetric": False}),
    "packed8-g32-zp": ("pack-quantized", GROUPED | {"symmetric": False}),
    "packed4": ("pack-quantized", {"num_bits": 4}),
    "packed4-zp": ("pack-quantized", {"num_bits": 4, "symmetric": False}),
    "packed4-g32": ("pack-quantized", {"num_bits": 4} | GROUPED),
    "packed4-g32-zp": ("pack-quantized", {"num_bits": 4, "symmetric": False} | GROUPED),
    "packed4-g32-order": ("pack-quantized", {"num_bits": 4, "symmetric": False, "actorder": "group"} | GROUPED),
    "fp8-tensor": ("float-quantized", {"type": "float", "strategy": "tensor"}),
    "fp8": ("float-quantized", {"type": "float"}),
    "fp8-blocks": ("float-quantized", {"type": "float", "strategy": "block", "block_structure": [48, 32]}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
}


def weights_of(name: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False} | LAYOUTS[name][1]


def described(*groups: tuple[str, list[str]]) -> dict[str, Any]:
    """A quantization_config with a config group of every layout, for its targets."""
    made = {
        f"group_{number}": {"targets": targets, "weights": weights_of(name), "format": LAYOUTS[name][0]}
        for number, (name, targets) in enumerate(groups)
    }
    layouts = {group["format"] for group in made.values()}
    return {
        "quant_method": "compressed-tensors", "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed", "config_groups": made, "ignore": ["lm_head"],
    }  # fmt: skip


def by_the_library(name: str, dtype: torch.dtype) -> Callable[[str, torch.Tensor], Stored]:
    """What the library's compressor makes of a weight by the tests' scales, and what it reads from that in float32."""
    layout, args = LAYOUTS[name][0], QuantizationArgs(**weights_of(name))
    compressor = BaseCompressor.get_value_from_registry(layout)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)

    def encode(_: str, weight: torch.Tensor) -> Stored:
        given = {"weight": weight, **_scales(args, weight, dtype)}
        held = compressor.compress(given, scheme)
        exact = {key: value.float() if key == "weight_scale" else value for key, value in held.items()}
        if layout.startswith("nvfp4"):
            return held, _nvfp4(held)
        if args.strategy == "block":
            return held, _blocks(held, args.block_structure)
        return held, compressor.decompress(exact, scheme)["weight"].float()

    return encode


def _scales(args: QuantizationArgs, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = weight.shape[1]
    if args.type == "float" and args.num_bits == 4:
        scale = weight.unflatten(1, (-1, 16)).abs().amax(2) / 6
        whole = 448 / scale.amax()
        return {"weight_scale": (scale * whole).to(torch.float8_e4m3fn).float(), "weight_global_scale": whole.view(1)}
    if args.type == "float" and args.strategy == "block":
        blocks = [torch.arange(size) // block for size, block in zip(weight.shape, args.block_structure, strict=True)]
        scale = torch.zeros(*(int(block[-1]) + 1 for block in blocks))
        for row, column in torch.cartesian_prod(*(torch.arange(size) for size in scale.shape)):
            scale[row, column] = weight[blocks[0] == row][:, blocks[1] == column].abs().amax() / 448
        return {"weight_scale": scale.to(dtype)}
    if args.type == "float":
        amax = weight.abs().amax() if args.strategy == "tensor" else weight.abs().amax(1, keepdim=True)
        return {"weight_scale": (amax / 448).to(dtype).view(1 if args.strategy == "tensor" else (-1, 1))}
    if args.strategy == "tensor":
        return {"weight_scale": (weight.abs().amax() / 127).to(dtype).view(1)}
    found, middle = {}, 2 ** (args.num_bits - 1)
    if args.actorder:
        found["weight_g_idx"] = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)).int() % (
            inputs // 32
        )
        weight = weight[:, found["weight_g_idx"].argsort()]
    _, scale, zeros = grid(weight, args.num_bits, args.group_size or inputs, dtype, not args.symmetric)
    found["weight_scale"] = scale
    return found if args.symmetric else found | {"weight_zero_point": (zeros - middle).to(torch.int8)}


def _blocks(held: dict[str, torch.Tensor], block: list[int]) -> torch.Tensor:
    """By hand, since the library takes the block's size from the scale's, which says too little at the edges."""
    scale = held["weight_scale"].float()
    for axis, size in enumerate(block):
        scale = scale.repeat_interleave(size, axis).narrow(axis, 0, held["weight"].shape[axis])
    return held["weight"].float() * scale


def _nvfp4(held: dict[str, torch.Tensor]) -> torch.Tensor:
    """By hand, since the library rounds to bfloat16: a value times its group's scale over the tensor's."""
    scale = held["weight_scale"].float() / held["weight_global_scale"]
    return float4_values(held["weight_packed"]) * scale.repeat_interleave(16, 1)


def float4_values(packed: torch.Tensor) -> torch.Tensor:
    """Two values of a byte, the lower half first."""
    codes = torch.stack([packed % 16, packed // 16], -1).flatten(1).long()
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return magnitudes[codes % 8] * torch.where(codes >= 8, -1.0, 1.0)
