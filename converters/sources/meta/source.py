"""Meta's own LLaMA checkpoints: consolidated.00.pth ..., one file per model-parallel part, merged row by row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from converters.console.errors import InputError, MissingTensor, UnmappedTensor
from converters.formats.tensor_files import PickleFile
from converters.model.config import ModelConfig
from converters.model.dtypes import DTYPES, dtype_to_write
from converters.model.model_name import name_of_directory
from converters.model.parameters import EMBEDDING, Parameter, check_names, parameters
from converters.sources.fingerprint import fingerprint
from converters.sources.interleaved_rows import INTERLEAVED, interleaved_rows
from converters.sources.meta.params import FILE_NAME as PARAMS
from converters.sources.meta.params import Params, read_params
from converters.sources.meta.parts import (
    check_count,
    check_replicas,
    check_same_names,
    check_shapes,
    merged_rows,
    open_parts,
    part_paths,
)
from converters.tokenizers.auxiliary_files import MODEL, read_auxiliary_files, with_tokenizer

if TYPE_CHECKING:
    import torch

# Meta's name -> Hugging Face name: tensors outside the blocks; in block N, what is between "layers.N." and ".weight".
MODEL_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"layers\.(0|[1-9][0-9]*)\.([a-z0-9_.]+)\.weight")
# The frequencies of rotary embeddings, which follow from the configuration.
_COMPUTED = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")
_EMBEDDING, _WQ, _W1 = "tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"


class _Stored(NamedTuple):
    """A tensor's name in the parts, and the axis along which they split it (None: each part holds all of it)."""

    name: str
    axis: int | None


class MetaSource:
    """The weights of one of Meta's directories, as a TensorSource."""

    def __init__(
        self, directory: Path, config: ModelConfig, parts: list[PickleFile], stored: dict[str, _Stored]
    ) -> None:
        self.config = config
        self._directory, self._parts, self._stored = directory, parts, stored
        self._auxiliary = with_tokenizer(directory, config, above=True)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor by its Hugging Face name, merged from the parts and in rotate-half order."""
        import torch

        stored = self._stored[name]
        if not name.endswith(INTERLEAVED):
            return merged_rows(self._parts, *stored, start, stop)
        head_dim = self.config.head_dim
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim  # whole heads
        heads = merged_rows(self._parts, *stored, first, last)
        return heads[torch.from_numpy(interleaved_rows(start, stop, head_dim) - first)]

    def default_dtype(self) -> str:
        return dtype_to_write({self._parts[0].dtype(name) for name, _ in self._stored.values()}, said=None)

    def fingerprint(self) -> str:
        auxiliary = read_auxiliary_files(self._directory)
        if MODEL in self._auxiliary:  # it may come from the folder above
            auxiliary[MODEL] = self._auxiliary[MODEL]
        return fingerprint(self.config, self.files(), auxiliary)

    def files(self) -> list[Path]:
        return [part.path for part in self._parts]

    def auxiliary_files(self) -> dict[str, bytes]:
        return dict(self._auxiliary)


def is_meta(directory: Path) -> bool:
    """Whether a directory is one of Meta's; with a config.json it counts as Hugging Face's."""
    if (directory / "config.json").exists():
        return False
    return (directory / PARAMS).exists() or bool(part_paths(directory))


def open_meta(directory: Path) -> MetaSource:
    """Open one of Meta's directories, checking everything but the values of split tensors.

    Raises InputError for a missing part, parts of different checkpoints, tensors that don't fit params.json and
    unreadable files; for names its subclasses UnmappedTensor, UnexpectedTensor and MissingTensor.
    """
    if not (directory / PARAMS).is_file():
        raise InputError(f"{directory} holds parts of a checkpoint of Meta's without {PARAMS}; fetch it too.")
    params = read_params(directory / PARAMS)
    parts = open_parts(directory)
    named = _by_hf_name(parts[0])
    check_same_names(parts, _COMPUTED)
    check_count(parts, _matrix(parts[0], _WQ)[0], params.dim, _WQ)
    try:
        config = params.config(name_of_directory(directory), _vocab_size(parts, params))
    except InputError as error:
        raise InputError(f"{directory / PARAMS}: {error}") from None
    check_names(config, named, str(directory))
    _check_feed_forward(parts, params)
    stored = {p.name: _Stored(named[p.name], _split_axis(p, parts[0], named[p.name])) for p in parameters(config)}
    for parameter in parameters(config):
        check_shapes(parts, *stored[parameter.name], parameter.shape)
    check_replicas(parts, (name for name, axis in stored.values() if axis is None))
    return MetaSource(directory, config.with_dtype(_dtype(parts[0], stored)), parts, stored)


def _by_hf_name(first: PickleFile) -> dict[str, str]:
    """Hugging Face's name -> Meta's, for the tensors of a part. Raises UnmappedTensor or MissingTensor."""
    named = {}
    for name in first.names():
        block = _BLOCK_NAME.fullmatch(name)
        if name in MODEL_NAMES:
            named[MODEL_NAMES[name]] = name
        elif block and block[2] in BLOCK_NAMES:
            named[f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.weight"] = name
        elif not _COMPUTED.fullmatch(name):
            raise UnmappedTensor(f"{first.path} holds the tensor {name[:80]!r}, which no LLaMA model has.")
    for name in (_EMBEDDING, _WQ, _W1):  # sizes are read from these; the rest is checked against the table
        if name not in first.names():
            raise MissingTensor(f"{first.path} lacks the tensor {name}.")
    return named


def _vocab_size(parts: list[PickleFile], params: Params) -> int:
    """The rows of the whole embedding, which LLaMA 1 and 2 split by columns and LLaMA 3 by rows."""
    rows, width = _matrix(parts[0], _EMBEDDING)
    return rows * len(parts) if width == params.dim else rows


def _check_feed_forward(parts: list[PickleFile], params: Params) -> None:
    rows = _matrix(parts[0], _W1)[0] * len(parts)
    if rows != params.intermediate_size:
        raise InputError(
            f"{parts[0].path} holds a feed-forward layer of {rows} over all parts; dim, multiple_of and "
            f"ffn_dim_multiplier of {PARAMS} make {params.intermediate_size}. They are not of one model."
        )


def _matrix(part: PickleFile, name: str) -> tuple[int, int]:
    shape = part.shape(name)
    if len(shape) != 2:
        raise InputError(f"{part.path} holds the tensor {name} in shape {list(shape)}; it must have two axes.")
    return shape[0], shape[1]


def _split_axis(parameter: Parameter, part: PickleFile, name: str) -> int | None:
    """The axis along which the parts split a tensor: the table's, except for the embedding of LLaMA 1 and 2."""
    if parameter.row is EMBEDDING:
        return 0 if part.shape(name)[1] == parameter.shape[1] else 1
    return parameter.row.shard


def _dtype(part: PickleFile, stored: dict[str, _Stored]) -> str:
    """The dtype of the weights; float32 where they are mixed. Raises InputError for one that isn't read."""
    found = set()
    for name, _ in stored.values():
        if part.dtype(name) not in DTYPES:
            raise InputError(f"{part.path} holds {name} as {part.dtype(name)}; this tool reads {', '.join(DTYPES)}.")
        found.add(part.dtype(name))
    return found.pop() if len(found) == 1 else "float32"
