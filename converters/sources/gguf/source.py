"""Models in GGUF files (llama.cpp's format), dequantized row by row, in Hugging Face's names and row order."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError, MissingTensor, UnmappedTensor
from converters.formats.gguf_header import Metadata
from converters.formats.gguf_parts import GGUFTensor, Parts, open_parts
from converters.model.architecture import Positions
from converters.model.config import ModelConfig
from converters.model.dtypes import dtype_to_write
from converters.model.families.family import Family
from converters.model.families.registry import find_gguf_family, known_gguf_architectures
from converters.model.model_name import is_name, name_of_file
from converters.model.parameters import LM_HEAD, Parameter, check_names, is_known, parameters
from converters.sources.codes import Coded, Coding
from converters.sources.fingerprint import sample_files
from converters.sources.gguf.codes import codes_of, coding_of
from converters.sources.gguf.rope import TABLE as ROPE_TABLE
from converters.sources.gguf.rope import rope_scaling
from converters.sources.interleaved_rows import INTERLEAVED, interleaved_rows
from converters.tokenizers.gguf_tokenizer import end_tokens, special_ids, tokenizer_files

if TYPE_CHECKING:
    import numpy as np
    import torch

_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\.(weight|bias)")
_EMBEDDING = "token_embd.weight"

# Metadata that changes the arithmetic: key without architecture -> values that leave the feature off, and its name.
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
    """A GGUF file's weights as a CodedSource: float32, in Hugging Face's names and rotate-half row order."""

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts,
        stored: dict[str, GGUFTensor],
        files: dict[str, bytes],
        interleaved: bool,
    ) -> None:
        """``interleaved``: the rows of Q and K are in the file in the order of interleaved rotary embeddings."""
        self.config = config
        self._parts, self._stored, self._files, self._interleaved = parts, stored, files, interleaved

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor by its Hugging Face name, dequantized: float32, [stop - start, ...]."""
        import gguf
        import numpy as np
        import torch

        tensor = self._stored[name]
        with np.errstate(all="ignore"):  # overflow and NaN are checked by the caller
            if len(tensor.shape) == 1:  # a single row of blocks, which must be dequantized as a whole
                values = gguf.dequantize(tensor.raw(start, stop), tensor.type)[start:stop]
            else:
                values = gguf.dequantize(self._raw(name, start, stop), tensor.type)
            return torch.from_numpy(np.array(values, dtype=np.float32))

    def _raw(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a matrix in the file's bytes, in Hugging Face's order."""
        tensor = self._stored[name]
        if not (self._interleaved and name.endswith(INTERLEAVED)):
            return tensor.raw(start, stop)
        head_dim = self.config.head_dim
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim  # whole heads
        return tensor.raw(first, last)[interleaved_rows(start, stop, head_dim) - first]

    def titles(self, config: ModelConfig) -> dict[str, str]:
        linears = [each.name for each in parameters(config) if each.row.is_linear]
        types = {name: self._stored[name].type.name for name in linears}
        return {name: f"GGUF type {found}" for name, found in types.items() if found not in FLOAT_TYPES}

    def coding(self, name: str) -> Coding | str:
        return coding_of(self._stored[name].type.name)

    def coded(self, name: str, start: int, stop: int) -> Coded:
        return codes_of(self._raw(name, start, stop), self._stored[name].type.name)

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
    """Open a GGUF model by its file or any of its parts, checking everything but the values.

    Raises InputError for a damaged file, another architecture, and any feature that the decoder or this reader lacks;
    for names of tensors its subclasses UnmappedTensor, UnexpectedTensor, MissingTensor and DuplicateTensor.
    """
    parts = open_parts(path)
    family = _family(parts.metadata)
    _check_features(parts.metadata)
    config = _config(family, parts.metadata, {tensor.name: tensor for tensor in parts.tensors})
    stored = _by_hf_name(family, parts.tensors)
    check_names(config, stored, str(path))
    for parameter in parameters(config):
        _check_tensor(parameter, stored[parameter.name])
    files = tokenizer_files(parts.metadata, config.vocab_size)
    return GGUFSource(config, parts, stored, files, family.gguf.interleaved)


def _by_hf_name(family: Family, tensors: list[GGUFTensor]) -> dict[str, GGUFTensor]:
    """The tensors by Hugging Face name. Raises UnmappedTensor for a tensor without one."""
    named = {}
    for tensor in tensors:
        name = _hf_name(family, tensor.name)
        if is_known(name, family.architecture):
            named[name] = tensor
        elif tensor.name != ROPE_TABLE:  # it belongs to the configuration
            raise UnmappedTensor(f"{tensor.path} holds the tensor {tensor.name!r}, which no {family.title} model has.")
    return named


def _hf_name(family: Family, name: str) -> str:
    """A tensor's Hugging Face name; empty where its family has no such tensor."""
    block = _BLOCK_NAME.fullmatch(name)
    if block and block[2] in family.gguf.block_names:
        layer, part, kind = block.groups()
        return f"{family.architecture.prefix}layers.{layer}.{family.gguf.block_names[part]}.{kind}"
    return family.gguf.model_names.get(name, "")


def _check_tensor(parameter: Parameter, tensor: GGUFTensor) -> None:
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


def _family(metadata: Metadata) -> Family:
    architecture = metadata.text("general.architecture")
    family = find_gguf_family(architecture)
    if family is None:
        known = ", ".join(map(repr, known_gguf_architectures()))
        raise InputError(f"{metadata.path} is of architecture {architecture!r}; this tool converts {known}.")
    return family


def _check_features(metadata: Metadata) -> None:
    """Raise InputError for features that the decoder doesn't implement."""
    path = metadata.path
    for name, (off, feature) in _FEATURES.items():
        key = metadata.key(name)
        if metadata.values.get(key, off[0]) not in off:
            raise InputError(f"{path} asks for {feature} ({key}), which the decoder does not implement.")
    key = metadata.key("attention.sliding_window")
    window, positions = metadata.whole(key, 0), metadata.whole(metadata.key("context_length"))
    if 0 < window < positions:  # a longer one has no effect
        raise InputError(
            f"{path} asks for a sliding window of {window} tokens ({key}) within {positions} positions, which the "
            "decoder does not implement."
        )


def _config(family: Family, metadata: Metadata, tensors: dict[str, GGUFTensor]) -> ModelConfig:
    path, key, form = metadata.path, metadata.key, family.gguf
    if _EMBEDDING not in tensors:
        raise MissingTensor(f"{path} lacks the tensor {_EMBEDDING} ({form.model_names[_EMBEDDING]}).")
    vocab_size = tensors[_EMBEDDING].shape[0] if tensors[_EMBEDDING].shape else 0
    hidden, heads = metadata.whole(key("embedding_length")), metadata.whole(key("attention.head_count"))
    head_dim = _head_dim(metadata, hidden, heads)
    ids = special_ids(metadata, vocab_size)
    name = " ".join(metadata.text("general.name", "").split())
    config = ModelConfig(
        name=name if is_name(name) else name_of_file(path),
        architecture=family.architecture,
        hidden_size=hidden,
        intermediate_size=metadata.whole(key("feed_forward_length")),
        num_layers=metadata.whole(key("block_count")),
        num_heads=heads,
        num_kv_heads=metadata.whole(key("attention.head_count_kv"), heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        norm_eps=_decimal(metadata.number(key(form.norm_eps))),
        rope_theta=_decimal(metadata.number(key("rope.freq_base"), 10000.0)),
        max_position_embeddings=metadata.whole(key("context_length")),
        tie_word_embeddings=not any(form.model_names.get(name) == LM_HEAD.name for name in tensors),
        bos_token_id=ids.get("bos"),
        eos_token_ids=end_tokens(metadata, vocab_size),
        dtype="float32",
    )
    if family.architecture.positions is not Positions.ROTARY:
        return config
    return replace(config, rope_scaling=rope_scaling(metadata, tensors, config))


def _head_dim(metadata: Metadata, hidden: int, heads: int) -> int:
    """The dimensions of each head. Raises InputError where values or rotary embeddings have others."""
    path = metadata.path
    if heads < 1:
        raise InputError(f"{path} has {heads} attention heads; give another file of the model.")
    head_dim = metadata.whole(metadata.key("attention.key_length"), hidden // heads)
    for key in (metadata.key("attention.value_length"), metadata.key("rope.dimension_count")):
        found = metadata.whole(key, head_dim)
        if found != head_dim:
            raise InputError(
                f"{path} has {key} {found} and heads of {head_dim} dimensions; the decoder implements only equal ones."
            )
    return head_dim


def _decimal(value: float) -> float:
    """The shortest decimal of the same float32: 1e-05 for 9.999999747378752e-06; any other number unchanged."""
    import numpy as np

    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if single == value else value
