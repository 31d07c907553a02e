"""Weights in a Hugging Face directory: safetensors or torch's .bin, one file or an indexed set, read by rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.config import DTYPES, ModelConfig, read_config, read_json
from converters.errors import DuplicateTensor, InputError, MissingTensor, UnmappedTensor
from converters.fingerprint import fingerprint
from converters.layout import LM_HEAD, check_names, is_known, parameters
from converters.tensor_files import TensorFile, open_tensor_file

if TYPE_CHECKING:
    import torch

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
INDEX = "model.safetensors.index.json"
# Where weights may be, the first that exists counts: a directory often holds both forms.
_CANDIDATES = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
# Buffers that older versions of transformers saved: functions of the configuration, not weights.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class HFSource:
    """The weights of a Hugging Face directory under the TensorSource protocol."""

    def __init__(self, directory: Path, config: ModelConfig, holder: dict[str, TensorFile]) -> None:
        self.config = config
        self._directory = directory
        self._holder = holder

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._holder[name].rows(name, start, stop)

    def fingerprint(self) -> str:
        return fingerprint(self.config, self.files(), self.companions())

    def files(self) -> list[Path]:
        return sorted({file.path for file in self._holder.values()})

    def companions(self) -> dict[str, bytes]:
        return read_companions(self._directory)


def read_companions(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files and the like in a directory: file name -> content."""
    present = (directory / name for name in COMPANIONS)
    return {path.name: path.read_bytes() for path in present if path.is_file()}


def open_hf(directory: Path) -> HFSource:
    """Open a Hugging Face LLaMA directory and hold its tensors against the parameter table.

    Raises InputError for an unreadable or untrustworthy file, for a tensor of another shape or of no floating type,
    and its four subclasses for names that don't fit.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} does not exist or is no directory.")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} is no checkpoint: it has no config.json, nor Meta's params.json.")
    config = read_config(directory / "config.json")
    holder = _hold(_weight_files(directory), config)
    check_names(config, holder, str(directory))
    return HFSource(directory, config.with_dtype(_check_tensors(config, holder)), holder)


def _hold(files: list[TensorFile], config: ModelConfig) -> dict[str, TensorFile]:
    """Which file holds each tensor, computed buffers and a tied output head left out."""
    holder: dict[str, TensorFile] = {}
    for file in files:
        for name in file.names():
            if _COMPUTED.fullmatch(name) or (config.tie_word_embeddings and name == LM_HEAD.name):
                continue
            if not is_known(name):
                raise UnmappedTensor(f"{file.path} holds the tensor {name}, which is not part of a LLaMA model.")
            if name in holder:
                raise DuplicateTensor(f"The tensor {name} is held twice: by {holder[name].path} and by {file.path}.")
            holder[name] = file
    return holder


def _check_tensors(config: ModelConfig, holder: dict[str, TensorFile]) -> str:
    """Hold shapes and dtypes against the table. Returns the dtype of the weights (the widest of a mixed set)."""
    found = set()
    for parameter in parameters(config):
        file = holder[parameter.name]
        shape, dtype = file.shape(parameter.name), file.dtype(parameter.name)
        if shape != parameter.shape:
            raise InputError(
                f"{file.path}: the tensor {parameter.name} is of shape {list(shape)}, but config.json calls for "
                f"{list(parameter.shape)}."
            )
        if dtype not in DTYPES:
            raise InputError(
                f"{file.path}: the tensor {parameter.name} is of type {dtype}; this tool reads {', '.join(DTYPES)}. "
                "Convert the unquantized original."
            )
        found.add(dtype)
    return found.pop() if len(found) == 1 else "float32"


def _weight_files(directory: Path) -> list[TensorFile]:
    for candidate in _CANDIDATES:
        path = directory / candidate
        if path.is_file():
            return _indexed_files(path) if path.suffix == ".json" else [open_tensor_file(path)]
    raise InputError(f"{directory} is no whole checkpoint: it has none of {', '.join(_CANDIDATES)}.")


def _indexed_files(index: Path) -> list[TensorFile]:
    """The files that an index names, each opened, after holding what they contain against it."""
    places = weight_map(index)
    files = {}
    for file_name in dict.fromkeys(places.values()):
        path = index.parent / file_name
        if not path.is_file():
            raise InputError(f"{index} names the file {file_name}, which is not there. Fetch it, or convert again.")
        files[file_name] = open_tensor_file(path)
    names = {file_name: set(file.names()) for file_name, file in files.items()}
    for name, file_name in places.items():
        if name not in names[file_name]:
            raise MissingTensor(f"{index} says that {file_name} holds the tensor {name}, but it does not.")
    return list(files.values())


def weight_map(index: Path) -> dict[str, str]:
    """An index's map from tensor to file, every name a plain one: an index must not reach out of its directory."""
    content: Any = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no weight_map; fetch or write it again.")
    for name, file_name in places.items():
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", file_name):
            raise InputError(
                f"{index} places the tensor {name[:80]} in {str(file_name)[:80]!r}; it must be a file beside it."
            )
    return places
