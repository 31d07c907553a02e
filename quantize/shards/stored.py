"""What the shards hold of each parameter: int8 values with their scales, or the weight in a floating dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converters.console.errors import InputError
from converters.formats.compressed_tensors import quantization_config
from converters.formats.safetensors import CODES, ITEM_BYTES, TensorSpec
from converters.model.config import ModelConfig
from converters.model.parameters import LM_HEAD, Parameter, Row, make_parameter, parameters
from quantize.shards.partition import local_shape, padding

SCHEMES = ("int8", "bf16")


@dataclass(frozen=True)
class Scheme:
    """``int8``: the blocks' linears (and lm_head on demand) in int8; ``bf16``: everything in bfloat16."""

    name: str
    quantize_lm_head: bool = False

    def quantizes(self, row: Row) -> bool:
        return self.name == "int8" and (row.quantized or (self.quantize_lm_head and row is LM_HEAD))

    def check(self, config: ModelConfig) -> None:
        """Raise InputError where the scheme doesn't fit the model."""
        if self.quantize_lm_head and (self.name != "int8" or config.tie_word_embeddings):
            why = (
                "it has no lm_head of its own (tied embeddings)" if self.name == "int8" else "--bf16 quantizes nothing"
            )
            raise InputError(f"--quantize-lm-head can't be applied to {config.name}: {why}. Leave it out.")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the shards before its split: a parameter of the model, or the scale that goes with one."""

    parameter: Parameter
    dtype: str

    @property
    def name(self) -> str:
        return self.parameter.name

    def spec(self, config: ModelConfig, chips: int) -> TensorSpec:
        """Its entry in each chip's file."""
        return TensorSpec(self.name, CODES[self.dtype], local_shape(config, self.parameter, chips))


@dataclass(frozen=True)
class StoredParameter:
    """How the shards hold one parameter of the model; ``scale`` is there where it is quantized."""

    weight: StoredTensor
    scale: StoredTensor | None

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.weight,) if self.scale is None else (self.weight, self.scale)


def stored_parameters(config: ModelConfig, scheme: Scheme) -> list[StoredParameter]:
    """Every parameter in its stored form, in the order of the files. ``config.dtype`` is that of unquantized ones."""
    scheme.check(config)
    plain = "bfloat16" if scheme.name == "bf16" else config.dtype
    stored = []
    for parameter in parameters(config):
        if not scheme.quantizes(parameter.row):
            stored.append(StoredParameter(StoredTensor(parameter, plain), None))
            continue
        prefix = parameter.name.removesuffix(parameter.row.name)
        scale = make_parameter(parameter.row.scale(), config, prefix, parameter.in_block)
        stored.append(StoredParameter(StoredTensor(parameter, "int8"), StoredTensor(scale, "float32")))
    return stored


def quantization_fields(config: ModelConfig, scheme: Scheme) -> dict[str, Any]:
    """What config.json says beside the model's dimensions: its ``quantization_config`` where there are int8 weights."""
    quantized = {stored.weight.name for stored in stored_parameters(config, scheme) if stored.scale is not None}
    return {"quantization_config": quantization_config(config, quantized)} if quantized else {}


def stored_tensors(config: ModelConfig, scheme: Scheme) -> list[StoredTensor]:
    """Every tensor that the shards hold, in the order of the files."""
    return [tensor for stored in stored_parameters(config, scheme) for tensor in stored.tensors]


def chip_specs(config: ModelConfig, scheme: Scheme, chips: int) -> list[TensorSpec]:
    """The entries of each chip's file: the same for every chip."""
    return [tensor.spec(config, chips) for tensor in stored_tensors(config, scheme)]


def padding_bytes(config: ModelConfig, scheme: Scheme, chips: int) -> int:
    """What splitting adds over all chips: heads of zeros, repeated KV heads, blocks rounded up to equal ones."""
    total = 0
    for tensor in stored_tensors(config, scheme):
        extra = padding(config, tensor.parameter, chips)
        if extra:
            shard_length = tensor.parameter.shape[tensor.parameter.row.shard]
            total += extra * tensor.parameter.elements // shard_length * ITEM_BYTES[CODES[tensor.dtype]]
    return total
