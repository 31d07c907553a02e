"""Weights in a Hugging Face directory: safetensors or torch's .bin, one file or an indexed set, read by rows."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.architecture import Architecture
from converters.companions import read_companions, with_tokenizer
from converters.compressed import SCALE_SUFFIX, dequantize, is_int8, quantization_config
from converters.config import DTYPES, ModelConfig, read_config, read_json
from converters.errors import DuplicateTensor, InputError, MissingTensor, UnexpectedTensor, UnmappedTensor
from converters.files import CODES, TensorSpec
from converters.fingerprint import fingerprint
from converters.layout import LM_HEAD, check_names, is_known, parameters
from converters.notes import note
from converters.tensor_files import TensorFile, open_tensor_file

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
# Where weights may be, the first that exists counts: a directory often holds both forms.
_CANDIDATES = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
# Buffers that older versions of transformers saved: functions of the configuration, not weights.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.decoder\.version")
_BASE = "model."  # before the names of a whole model's tensors; left out where the model was saved without its head


class _Held(NamedTuple):
    """Where a tensor is: its file, and its name there."""

    file: TensorFile
    name: str

    @property
    def path(self) -> Path:
        return self.file.path


class HFSource:
    """The weights of a Hugging Face directory under the TensorSource protocol."""

    def __init__(self, directory: Path, config: ModelConfig, holder: dict[str, _Held]) -> None:
        self.config = config
        self.directory = directory
        self._holder = holder
        self._companions = with_tokenizer(directory, config)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        held = self._holder[name]
        return held.file.rows(held.name, start, stop)

    def fingerprint(self) -> str:
        return fingerprint(self.config, self.files(), read_companions(self.directory))

    def files(self) -> list[Path]:
        return sorted({held.path for held in self._holder.values()})

    def companions(self) -> dict[str, bytes]:
        return dict(self._companions)


class CompressedSource(HFSource):
    """Weights in the compressed-tensors layout (compressed.py) under the Int8Source protocol."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        values = super().rows(name, start, stop)
        scale = name + SCALE_SUFFIX
        return dequantize(values, super().rows(scale, start, stop)) if scale in self._holder else values

    def stored_specs(self, config: ModelConfig) -> list[TensorSpec]:
        specs, quantized = [], self._quantized(config)
        for parameter in parameters(config):
            is_int8 = parameter.name in quantized
            specs.append(TensorSpec(parameter.name, CODES["int8" if is_int8 else config.dtype], parameter.shape))
            if is_int8:
                specs.append(TensorSpec(parameter.name + SCALE_SUFFIX, CODES["float32"], (parameter.shape[0], 1)))
        return specs

    def stored_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.rows(name, start, stop) if name in self._looked_up else super().rows(name, start, stop)

    def quantization_fields(self, config: ModelConfig) -> dict[str, Any]:
        return {"quantization_config": quantization_config(config, self._quantized(config))}

    def _quantized(self, config: ModelConfig) -> set[str]:
        """The names of the linears' weights that are int8."""
        return {p.name for p in parameters(config) if p.row.is_linear and p.name + SCALE_SUFFIX in self._holder}

    @cached_property
    def _looked_up(self) -> set[str]:
        """The names of the int8 tables that are no linears' weights, such as the embedding: they are dequantized."""
        return {p.name for p in parameters(self.config) if p.row.looked_up and p.name + SCALE_SUFFIX in self._holder}


def open_hf(directory: Path) -> HFSource:
    """Open a Hugging Face directory and hold its tensors against the parameter table.

    Raises InputError for an unreadable or untrustworthy file, for a tensor of another shape or of no floating type,
    and its four subclasses for names that don't fit.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} does not exist or is no directory.")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} is no checkpoint: it has no config.json, nor Meta's params.json.")
    int8 = is_int8(read_json(directory / "config.json"), str(directory))
    config = read_config(directory / "config.json", quantized=int8)
    holder = _hold(_weight_files(directory), config, SCALE_SUFFIX if int8 else "")
    scales = {name for name in holder if int8 and name.endswith(SCALE_SUFFIX)}
    check_names(config, (name for name in holder if name not in scales), str(directory))
    config = config.with_dtype(_check_tensors(config, holder, scales))
    return (CompressedSource if int8 else HFSource)(directory, config, holder)


def _hold(files: list[TensorFile], config: ModelConfig, suffix: str) -> dict[str, _Held]:
    """Which file holds each tensor, computed buffers and a tied output head left out.

    The name of a weight may be followed by ``suffix``.
    """
    architecture = config.architecture
    holder: dict[str, _Held] = {}
    for file in files:
        for stored in file.names():
            name = _whole_name(stored, suffix, architecture)
            weight = name.removesuffix(suffix)
            if _COMPUTED.fullmatch(name) or (config.tie_word_embeddings and weight == LM_HEAD.name):
                continue
            if not is_known(weight, architecture):
                title = architecture.title
                raise UnmappedTensor(f"{file.path} holds the tensor {name}, which is not part of a model of {title}.")
            if name in holder:
                raise DuplicateTensor(f"The tensor {name} is held twice: by {holder[name].path} and by {file.path}.")
            holder[name] = _Held(file, stored)
    return holder


def _whole_name(stored: str, suffix: str, architecture: Architecture) -> str:
    """A tensor's name in a whole model: some, like OPT-66B's, were saved without the output head, or its prefix."""
    based = _BASE + stored
    known = is_known(based.removesuffix(suffix), architecture) or _COMPUTED.fullmatch(based)
    return based if known else stored


def _check_tensors(config: ModelConfig, holder: dict[str, _Held], scales: set[str]) -> str:
    """Hold shapes and dtypes against the table; what has one of the ``scales`` is int8.

    Returns the dtype of the weights that are not quantized (the widest of a mixed set).
    """
    found, left = set(), set(scales)
    for parameter in parameters(config):
        scale = parameter.name + SCALE_SUFFIX
        if scale in scales and len(parameter.shape) == 2:
            left.remove(scale)
            _check_tensor(holder[scale], scale, (parameter.shape[0], 1), DTYPES)
            _check_tensor(holder[parameter.name], parameter.name, parameter.shape, ("int8",))
            if not parameter.row.is_linear:
                note(f"{holder[scale].path} holds {parameter.name} in int8. It is dequantized: int8 is for linears.")
        else:
            found.add(_check_tensor(holder[parameter.name], parameter.name, parameter.shape, DTYPES))
    for scale in left:
        raise UnexpectedTensor(f"{holder[scale].path} holds {scale}, the scale of no matrix of its configuration.")
    return found.pop() if len(found) == 1 else "float32"


def _check_tensor(held: _Held, name: str, expected: tuple[int, ...], dtypes: tuple[str, ...]) -> str:
    """Hold one tensor's shape and dtype against what is expected. Returns the dtype."""
    shape, dtype = held.file.shape(held.name), held.file.dtype(held.name)
    if shape != expected:
        raise InputError(
            f"{held.path}: the tensor {name} is of shape {list(shape)}, but config.json calls for {list(expected)}."
        )
    if dtype not in dtypes:
        raise InputError(
            f"{held.path}: the tensor {name} is of type {dtype}; this tool reads {', '.join(dtypes)} there. "
            "Convert the unquantized original."
        )
    return dtype


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
