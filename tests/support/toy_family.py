"""A family that the toolchain doesn't know: LLaMA with other names, and norms that multiply by 1 + their weight."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

import torch

from converters.model.config import ModelConfig
from converters.model.families.family import Family, Fields, GGUFForm
from converters.model.families.llama import GGUF, LLAMA
from runtime.model.parts.norms import RMSNorm


class ToyNorm(Enum):
    """What would be one more member of Norm, which can't be added to from outside."""

    ONE_PLUS = (("weight", 0.0),)


class OnePlusNorm(RMSNorm):
    """Root mean square normalization with factors of 1 + weight."""

    def __init__(self, eps: float, dtype: torch.dtype, weight: torch.Tensor) -> None:
        super().__init__(eps, dtype, 1 + weight.float())


def read(fields: Fields) -> Fields:
    return {
        "architecture": ARCHITECTURE,
        "intermediate_size": fields["inner_size"],
        "num_kv_heads": fields["num_key_value_heads"],
        "norm_eps": fields["toy_eps"],
    }


def write(config: ModelConfig) -> Fields:
    return {
        "inner_size": config.intermediate_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "toy_eps": config.norm_eps,
    }


ARCHITECTURE = replace(
    LLAMA.architecture,
    model_type="toy",
    title="Toy",
    prefix="toy.",
    norm=ToyNorm.ONE_PLUS,
    attention_norm="norm_1",
    feed_forward_norm="norm_2",
)


def renamed(name: str) -> str:
    """The name here of a tensor of LLaMA's."""
    name = name.replace("model.", "toy.").replace("input_layernorm", "norm_1")
    return name.replace("post_attention_layernorm", "norm_2")


TOY = Family(
    architecture=ARCHITECTURE,
    model_types={"toy": {"toy_eps": 1e-5}},
    required=("inner_size", "num_key_value_heads"),
    read=read,
    write=write,
    gguf=GGUFForm(
        architecture="toy",
        model_names={name: renamed(hf) for name, hf in GGUF.model_names.items()},
        block_names={name: renamed(hf) for name, hf in GGUF.block_names.items()},
        norm_eps="norm_epsilon",
        interleaved=False,
    ),
)
