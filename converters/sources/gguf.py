"""LLaMA models in GGUF files (llama.cpp's format), dequantized row by row, in Hugging Face's names and row order."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError, MissingTensor, UnmappedTensor
from converters.formats.gguf_header import Metadata
from converters.formats.gguf_parts import Parts, StoredTensor, open_parts
from converters.model.config import ModelConfig
from converters.model.dtypes import dtype_to_write
from converters.model.model_name import is_name, name_of_file
from converters.model.parameters import Parameter, check_names, parameters
from converters.sources.fingerprint import sample_files
from converters.sources.gguf_rope import TABLE as ROPE_TABLE
from converters.sources.gguf_rope import rope_scaling
from converters.sources.interleaved_rows import INTERLEAVED, interleaved_rows
from converters.tokenizers.gguf_tokenizer import end_tokens, special_ids, tokenizer_files

if TYPE_CHECKING:
    import torch

# GGUF name -> Hugging Face name: tensors outside the blocks; in block N, what is between "blk.N." and ".weight".
MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\.weight")

# Metadata that changes the arithmetic: key after "llama." -> values that leave the feature off, and its name.
_FEATURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "expert_count": ((0,), "mixture of experts"),
    "attention.causal": ((True,), "attention to later tokens"),
    "attention.scale": ((0,), "an attention scale of its own"),
    "attention.clamp_kqv": ((0,), "clamped attention inputs"),
    "attention.max_alibi_bias": ((0,), "ALiBi"),
    "embedding_scale": ((0, 1), "scaled embeddings"),
    "residual_scale": ((0, 1), "scaled residuals"),
    "logit_scale": ((0, 1), "scaled logits"),
}

FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GGUFSource:
    """A GGUF file's weights as a TensorSource: float32, in Hugging Face's names and rotate-half row order."""

    def __init__(
        self, config: ModelConfig, parts: Parts, stored: dict[str, StoredTensor], files: dict[str, bytes]
    ) -> None:
        self.config = config
        self._parts, self._stored, self._files = parts, stored, files

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor by its Hugging Face name, dequantized: float32, [stop - start, ...]."""
        import gguf
        import numpy as np
        import torch

        tensor = self._stored[name]
        with np.errstate(all="ignore"):  # overflow and NaN are checked by the caller
            if len(tensor.shape) == 1:  # a single row of blocks, which must be dequantized as a whole
                values = gguf.dequantize(tensor.raw(start, stop), tensor.type)[start:stop]
            elif name.endswith(INTERLEAVED):
                head_dim = self.config.head_dim
                first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim  # whole heads
                order = interleaved_rows(start, stop, head_dim) - first
                values = gguf.dequantize(tensor.raw(first, last)[order], tensor.type)
            else:
                values = gguf.dequantize(tensor.raw(start, stop), tensor.type)
            return torch.from_numpy(np.array(values, dtype=np.float32))

    def default_dtype(self) -> str:
        """The dtype of the linears and the embedding (norms are always float32); bfloat16 where any is quantized."""
        types = {tensor.type.name for tensor in self._stored.values() if len(tensor.shape) == 2}
        return dtype_to_write({FLOAT_TYPES[name] for name in types}, None) if types <= set(FLOAT_TYPES) else "bfloat16"

    def fingerprint(self) -> str:
        """The hex sha256 of the headers (configuration, tokenizer, tensor table) and a sample of the files' pages."""
        digest = hashlib.sha256(self._parts.header)
        digest.update(sample_files(self._parts.paths).encode())
        return digest.hexdigest()

    def files(self) -> list[Path]:
        return self._parts.paths

    def auxiliary_files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json; empty for a file without a tokenizer."""
        return dict(self._files)


def open_gguf(path: Path) -> GGUFSource:
    """Open a GGUF model of LLaMA architecture by its file or any of its parts, checking everything but the values.

    Raises InputError for a damaged file, another architecture, and any feature that the decoder or this reader lacks;
    for names of tensors its subclasses UnmappedTensor, UnexpectedTensor, MissingTensor and DuplicateTensor.
    """
    parts = open_parts(path)
    _check_features(parts.metadata)
    config = _config(parts.metadata, {tensor.name: tensor for tensor in parts.tensors})
    stored = _by_hf_name(parts.tensors)
    check_names(config, stored, str(path))
    for parameter in parameters(config):
        _check_tensor(parameter, stored[parameter.name])
    return GGUFSource(config, parts, stored, tokenizer_files(parts.metadata, config.vocab_size))


def _by_hf_name(tensors: list[StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by Hugging Face name. Raises UnmappedTensor for a tensor without one."""
    named = {}
    for tensor in tensors:
        block = _BLOCK_NAME.fullmatch(tensor.name)
        if tensor.name in MODEL_NAMES:
            named[MODEL_NAMES[tensor.name]] = tensor
        elif block and block[2] in BLOCK_NAMES:
            named[f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.weight"] = tensor
        elif tensor.name != ROPE_TABLE:  # it belongs to the configuration
            raise UnmappedTensor(f"{tensor.path} holds the tensor {tensor.name!r}, which no LLaMA model has.")
    return named


def _check_tensor(parameter: Parameter, tensor: StoredTensor) -> None:
    """Raise InputError for a tensor of another shape than the table's, or of a type that can't be dequantized."""
    import gguf
    import numpy as np

    if tensor.shape != parameter.shape:
        raise InputError(
            f"{tensor.path} holds {tensor.name} ({parameter.name}) in shape {list(tensor.shape)}; "
            f"its metadata calls for {list(parameter.shape)}."
        )
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.type][1]), np.uint8), tensor.type)
    except NotImplementedError:
        raise InputError(
            f"{tensor.path} holds {tensor.name} in type {tensor.type.name}, which can't be dequantized; "
            "convert from a file in another type, such as F16 or Q8_0."
        ) from None


def _check_features(metadata: Metadata) -> None:
    """Raise InputError for another architecture, and for features that the decoder doesn't implement."""
    path = metadata.path
    architecture = metadata.text("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path} is of architecture {architecture!r}; this tool converts 'llama'.")
    for key, (off, feature) in _FEATURES.items():
        value = metadata.values.get(f"llama.{key}", off[0])
        if value not in off:
            raise InputError(f"{path} asks for {feature} (llama.{key}), which the decoder does not implement.")
    window, positions = metadata.whole("llama.attention.sliding_window", 0), metadata.whole("llama.context_length")
    if 0 < window < positions:  # a longer one has no effect
        raise InputError(
            f"{path} asks for a sliding window of {window} tokens (llama.attention.sliding_window) within {positions} "
            "positions, which the decoder does not implement."
        )


def _config(metadata: Metadata, tensors: dict[str, StoredTensor]) -> ModelConfig:
    path, embedding = metadata.path, "token_embd.weight"
    if embedding not in tensors:
        raise MissingTensor(f"{path} lacks the tensor {embedding} ({MODEL_NAMES[embedding]}).")
    vocab_size = tensors[embedding].shape[0] if tensors[embedding].shape else 0
    hidden, heads = metadata.whole("llama.embedding_length"), metadata.whole("llama.attention.head_count")
    if heads < 1:
        raise InputError(f"{path} has {heads} attention heads; give another file of the model.")
    head_dim = metadata.whole("llama.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.whole(f"llama.{key}", head_dim) != head_dim:
            raise InputError(
                f"{path} has llama.{key} {metadata.whole(f'llama.{key}')} and heads of {head_dim} dimensions; "
                "the decoder implements only equal ones."
            )
    ids = special_ids(metadata, vocab_size)
    name = " ".join(metadata.text("general.name", "").split())
    config = ModelConfig(
        name=name if is_name(name) else name_of_file(path),
        hidden_size=hidden,
        intermediate_size=metadata.whole("llama.feed_forward_length"),
        num_layers=metadata.whole("llama.block_count"),
        num_heads=heads,
        num_kv_heads=metadata.whole("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        norm_eps=_decimal(metadata.number("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=_decimal(metadata.number("llama.rope.freq_base", 10000.0)),
        max_position_embeddings=metadata.whole("llama.context_length"),
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=ids.get("bos"),
        eos_token_ids=end_tokens(metadata, vocab_size),
        dtype="float32",
    )
    return replace(config, rope_scaling=rope_scaling(metadata, tensors, config))


def _decimal(value: float) -> float:
    """The shortest decimal of the same float32: 1e-05 for 9.999999747378752e-06; any other number unchanged."""
    import numpy as np

    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if single == value else value
