"""LLaMA models in GGUF files (llama.cpp's format), dequantized row by row, in Hugging Face's names and row order."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.config import ModelConfig
from converters.errors import InputError, MissingTensor, UnmappedTensor
from converters.fingerprint import sample_files
from converters.gguf_header import Metadata, check_header, damaged
from converters.gguf_tokenizer import special_ids, tokenizer_files
from converters.interleaved import INTERLEAVED, interleaved_rows
from converters.layout import Parameter, check_names, parameters
from converters.mapped import release

if TYPE_CHECKING:
    import numpy as np
    import torch

# GGUF name -> Hugging Face name: the tensors outside the blocks, and those of block N between "blk.N." and ".weight".
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
_ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# Metadata that changes the arithmetic: key after "llama." -> the values that leave the feature off, and its name.
_FEATURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "rope.scaling.type": (("none",), "RoPE scaling"),
    "rope.scaling.factor": ((0, 1), "RoPE scaling"),
    "rope.scale_linear": ((0, 1), "RoPE scaling"),
    "expert_count": ((0,), "mixture of experts"),
    "attention.sliding_window": ((0,), "a sliding window"),
    "attention.causal": ((True,), "attention to later tokens"),
    "attention.scale": ((0,), "an attention scale of its own"),
    "attention.clamp_kqv": ((0,), "clamped attention inputs"),
    "attention.max_alibi_bias": ((0,), "ALiBi"),
    "embedding_scale": ((0, 1), "scaled embeddings"),
    "residual_scale": ((0, 1), "scaled residuals"),
    "logit_scale": ((0, 1), "scaled logits"),
}


class _Stored(NamedTuple):
    """A tensor in the file: its raw rows (uint8 blocks, or float16 or float32 elements) and how they are encoded."""

    rows: np.ndarray
    type: Any


class GGUFSource:
    """A GGUF file's weights as a TensorSource: float32, in Hugging Face's names and rotate-half row order."""

    def __init__(
        self, path: Path, config: ModelConfig, stored: dict[str, _Stored], header: bytes, files: dict[str, bytes]
    ) -> None:
        self.config = config
        self._path, self._stored, self._header, self._files = path, stored, header, files

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor by its Hugging Face name, dequantized: float32, [stop - start, ...]."""
        import gguf
        import numpy as np
        import torch

        data, kind = self._stored[name]
        with np.errstate(all="ignore"):  # overflow and NaN are judged by whoever reads the values
            if data.ndim == 1:  # a single row of blocks, which only dequantize as a whole
                values = gguf.dequantize(data, kind)[start:stop]
            elif name.endswith(INTERLEAVED):
                values = gguf.dequantize(data[interleaved_rows(start, stop, self.config.head_dim)], kind)
            else:
                values = gguf.dequantize(data[start:stop], kind)
            values = np.array(values, dtype=np.float32)
        used = data if data.ndim == 1 else data[start:stop]
        release(used.ctypes.data, used.nbytes)
        return torch.from_numpy(values)

    def fingerprint(self) -> str:
        """The hex sha256 of the header (configuration, tokenizer, tensor table) and a sample of the file's pages."""
        digest = hashlib.sha256(self._header)
        digest.update(sample_files([self._path]).encode())
        return digest.hexdigest()

    def files(self) -> list[Path]:
        return [self._path]

    def companions(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json; empty for a file without a tokenizer."""
        return dict(self._files)


def open_gguf(path: Path) -> GGUFSource:
    """Open a GGUF file of LLaMA architecture, checking everything but the values: names, shapes, types, tokenizer.

    Raises InputError for a damaged file, another architecture and any feature that the decoder or this reader lacks;
    of its subclasses UnmappedTensor, UnexpectedTensor, MissingTensor and DuplicateTensor for the names of tensors.
    """
    import numpy as np

    check_header(path)
    metadata, tensors, header = _read(path)
    _check_features(metadata, [tensor.name for tensor in tensors])
    config = _config(metadata, {tensor.name: _shape(tensor) for tensor in tensors})
    named = _by_hf_name(path, tensors)
    check_names(config, named, str(path))
    for parameter in parameters(config):
        _check_tensor(path, parameter, named[parameter.name])
    stored = {name: _Stored(np.asarray(tensor.data), tensor.tensor_type) for name, tensor in named.items()}
    return GGUFSource(path, config, stored, header, tokenizer_files(metadata, config.vocab_size))


def _shape(tensor: Any) -> tuple[int, ...]:
    """A tensor's shape as torch has it; GGUF lists the axes from the fastest on."""
    return tuple(int(length) for length in reversed(tensor.shape))


def _by_hf_name(path: Path, tensors: list[Any]) -> dict[str, Any]:
    """The tensors by Hugging Face name. Raises UnmappedTensor, naming the first one that has none."""
    named = {}
    for tensor in tensors:
        block = _BLOCK_NAME.fullmatch(tensor.name)
        if tensor.name in MODEL_NAMES:
            named[MODEL_NAMES[tensor.name]] = tensor
        elif block and block[2] in BLOCK_NAMES:
            named[f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.weight"] = tensor
        else:
            raise UnmappedTensor(f"{path} holds the tensor {tensor.name!r}, which no LLaMA model has.")
    return named


def _check_tensor(path: Path, parameter: Parameter, tensor: Any) -> None:
    """Hold a tensor's shape against the table, and its type against what can be dequantized."""
    import gguf
    import numpy as np

    if _shape(tensor) != parameter.shape:
        raise InputError(
            f"{path} holds {tensor.name} ({parameter.name}) in shape {list(_shape(tensor))}; "
            f"its metadata calls for {list(parameter.shape)}."
        )
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]), np.uint8), tensor.tensor_type)
    except NotImplementedError:
        raise InputError(
            f"{path} holds {tensor.name} in type {tensor.tensor_type.name}, which can't be dequantized; "
            "convert from a file in another type, such as F16 or Q8_0."
        ) from None


def _check_features(metadata: Metadata, names: list[str]) -> None:
    """Refuse what is not one whole LLaMA model, and features that the decoder doesn't implement, by name."""
    path = metadata.path
    if metadata.whole("split.count", 1) > 1:
        raise InputError(f"{path} is one part of a split model; join the parts with llama-gguf-split --merge.")
    architecture = metadata.text("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path} is of architecture {architecture!r}; this tool converts 'llama'.")
    for key, (off, feature) in _FEATURES.items():
        value = metadata.values.get(f"llama.{key}", off[0])
        if value not in off:
            raise InputError(f"{path} asks for {feature} (llama.{key}), which the decoder does not implement.")
    for name in _ROPE_TABLES:
        if name in names:
            raise InputError(f"{path} asks for RoPE scaling ({name}), which the decoder does not implement.")


def _config(metadata: Metadata, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    path, embedding = metadata.path, "token_embd.weight"
    if embedding not in shapes:
        raise MissingTensor(f"{path} lacks the tensor {embedding} ({MODEL_NAMES[embedding]}).")
    vocab_size = shapes[embedding][0] if shapes[embedding] else 0
    hidden, heads = metadata.whole("llama.embedding_length"), metadata.whole("llama.attention.head_count")
    if heads < 1:
        raise InputError(f"{path} has {heads} attention heads; fetch it again.")
    head_dim = metadata.whole("llama.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.whole(f"llama.{key}", head_dim) != head_dim:
            raise InputError(
                f"{path} has llama.{key} {metadata.whole(f'llama.{key}')} and heads of {head_dim} dimensions; "
                "the decoder implements only equal ones."
            )
    ids = special_ids(metadata, vocab_size)
    return ModelConfig(
        name=" ".join(metadata.text("general.name", "").split()) or path.stem,
        hidden_size=hidden,
        intermediate_size=metadata.whole("llama.feed_forward_length"),
        num_layers=metadata.whole("llama.block_count"),
        num_heads=heads,
        num_kv_heads=metadata.whole("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        rms_norm_eps=_decimal(metadata.number("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=_decimal(metadata.number("llama.rope.freq_base", 10000.0)),
        max_position_embeddings=metadata.whole("llama.context_length"),
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=ids.get("bos"),
        eos_token_ids=tuple(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids)),
        dtype="float32",
    )


def _decimal(value: float) -> float:
    """The shortest decimal for a number stored in float32: 1e-05 for 9.999999747378752e-06, the same float32."""
    import numpy as np

    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if single == value else value


def _read(path: Path) -> tuple[Metadata, list[Any], bytes]:
    """The metadata, the gguf library's tensors (memory mapped) and the bytes before the data."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except Exception as error:  # a parser of someone else's, on a file that may be damaged in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise damaged(path, reason[:100]) from None
    return Metadata(path, values), reader.tensors, reader.data[: reader.data_offset].tobytes()
