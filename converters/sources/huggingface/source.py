"""Weights in a Hugging Face directory: safetensors or torch's .bin, in one file or an indexed set."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.console.errors import DuplicateTensor, InputError, UnexpectedTensor, UnmappedTensor
from converters.console.notes import note
from converters.files.json_file import read_json
from converters.formats.compressed_tensors import (
    INT8_GROUP,
    SCALE_SUFFIX,
    dequantize,
    is_int8,
    note_ignored,
    quantization_config,
)
from converters.formats.safetensors import CODES, TensorSpec
from converters.formats.tensor_files import TensorFile
from converters.model.architecture import Architecture
from converters.model.config import ModelConfig
from converters.model.dtypes import DTYPES, READ_DTYPES, dtype_to_write, said_dtype, widest
from converters.model.families.hf_config import read_config
from converters.model.families.registry import family_of
from converters.model.parameters import LM_HEAD, check_names, is_known, parameters
from converters.sources.fingerprint import fingerprint
from converters.sources.huggingface.files import weight_files
from converters.sources.huggingface.surplus import (
    Held,
    biased_weight,
    is_computed,
    is_zero,
    note_left_out,
    same_bytes,
    settle_head,
)
from converters.tokenizers.auxiliary_files import read_auxiliary_files, with_tokenizer

if TYPE_CHECKING:
    import torch

_BASE = "model."  # begins tensors' names; missing where the model was saved without its head


class HFSource:
    """The weights of a Hugging Face directory under the TensorSource protocol."""

    def __init__(
        self, directory: Path, config: ModelConfig, holder: dict[str, Held], found: set[str], said: str | None
    ) -> None:
        self.config = config
        self.directory = directory
        self._holder = holder
        self._stored_dtypes, self._said_dtype = found, said
        self._auxiliary = with_tokenizer(directory, config)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        values = self._holder[name].rows(start, stop)
        return values.float() if values.dtype == torch.float64 else values

    def default_dtype(self) -> str:
        return dtype_to_write(self._stored_dtypes, self._said_dtype)

    def fingerprint(self) -> str:
        return fingerprint(self.config, self.files(), read_auxiliary_files(self.directory))

    def files(self) -> list[Path]:
        return sorted({held.path for held in self._holder.values()})

    def auxiliary_files(self) -> dict[str, bytes]:
        return dict(self._auxiliary)


class CompressedSource(HFSource):
    """Weights in the compressed-tensors layout (compressed_tensors.py) under the QuantizedSource protocol."""

    format = "int8"

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        values = super().rows(name, start, stop)
        scale = name + SCALE_SUFFIX
        return dequantize(values, super().rows(scale, start, stop)) if scale in self._holder else values

    def stored_specs(self, config: ModelConfig) -> list[TensorSpec]:
        specs, quantized = [], self.quantized_names(config)
        for parameter in parameters(config):
            is_int8 = parameter.name in quantized
            specs.append(TensorSpec(parameter.name, CODES["int8" if is_int8 else config.dtype], parameter.shape))
            if is_int8:
                specs.append(TensorSpec(parameter.name + SCALE_SUFFIX, CODES["float32"], (parameter.shape[0], 1)))
        return specs

    def stored_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.rows(name, start, stop) if name in self._looked_up else super().rows(name, start, stop)

    def quantization_fields(self, config: ModelConfig) -> dict[str, Any]:
        return {"quantization_config": quantization_config(config, [(INT8_GROUP, self.quantized_names(config))])}

    def quantized_names(self, config: ModelConfig) -> set[str]:
        return {p.name for p in parameters(config) if p.row.is_linear and p.name + SCALE_SUFFIX in self._holder}

    @cached_property
    def _looked_up(self) -> set[str]:
        """The names of int8 weights that are looked up, such as the embedding: these are always dequantized."""
        return {p.name for p in parameters(self.config) if p.row.looked_up and p.name + SCALE_SUFFIX in self._holder}


def open_hf(directory: Path) -> HFSource:
    """Open a Hugging Face directory and check its tensors against the parameter table.

    Raises InputError for an unreadable or unsafe file, and for a tensor of another shape or of a type that isn't read;
    for names its subclasses UnmappedTensor, UnexpectedTensor, MissingTensor and DuplicateTensor.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} does not exist or is no directory.")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} is no checkpoint: it has no config.json, nor Meta's params.json.")
    fields = read_json(directory / "config.json")
    int8 = is_int8(fields, str(directory))
    config = read_config(directory / "config.json", quantized=int8)
    suffix = SCALE_SUFFIX if int8 else ""
    holder = _hold(weight_files(directory, fields), config, suffix)
    config = settle_head(config, holder, LM_HEAD.name + SCALE_SUFFIX)
    scales = {name for name in holder if int8 and name.endswith(SCALE_SUFFIX)}
    check_names(config, (name for name in holder if name not in scales), str(directory))
    found = _check_tensors(config, holder, scales)
    if "float64" in found:
        note(f"{directory} holds tensors of float64, which are read as float32.")
    config = config.with_dtype(widest(found))
    if int8:
        linears = [parameter.name for parameter in parameters(config) if parameter.row.is_linear]
        note_ignored(fields, str(directory), linears, {scale.removesuffix(SCALE_SUFFIX) for scale in scales})
    return (CompressedSource if int8 else HFSource)(directory, config, holder, found, said_dtype(fields))


def _hold(files: list[TensorFile], config: ModelConfig, suffix: str) -> dict[str, Held]:
    """Where each of the model's weights is stored. Tensors that it doesn't need are left out, with a note.

    The name of a weight may be followed by ``suffix``. Raises UnmappedTensor for any other name, and DuplicateTensor
    for a tensor that is stored twice with different values.
    """
    needed, whole = {parameter.name for parameter in parameters(config)}, family_of(config.architecture).architecture
    holder: dict[str, Held] = {}
    computed, zeros, twice = [], [], []
    for held in (Held(file, stored) for file in files for stored in file.names()):
        name = _whole_name(held.name, suffix, whole)
        if is_computed(name):
            computed.append(held.name)
        elif name not in needed and is_known(biased_weight(name), whole) and is_zero(held):
            zeros.append(held.name)
        elif not is_known(name.removesuffix(suffix), whole):
            raise UnmappedTensor(f"{held.path} holds the tensor {name}, which is not part of a model of {whole.title}.")
        elif name not in holder:
            holder[name] = held
        elif same_bytes(holder[name], held):
            twice.append(held.name)
        else:
            raise DuplicateTensor(
                f"The tensor {name} is held twice, with other values: by {holder[name].path} and by {held.path}."
            )
    note_left_out(computed, "buffers that follow from config.json")
    note_left_out(zeros, "biases of zeros, which config.json doesn't ask for")
    note_left_out(twice, "held twice, with the same values")
    return holder


def _whole_name(stored: str, suffix: str, architecture: Architecture) -> str:
    """A tensor's name in a whole model. Models saved without their head, like OPT-66B, lack the prefix "model."."""
    based = _BASE + stored
    known = any(is_known(name, architecture) for name in (based.removesuffix(suffix), biased_weight(based)))
    return based if known else stored


def _check_tensors(config: ModelConfig, holder: dict[str, Held], scales: set[str]) -> set[str]:
    """Check shapes and dtypes; a weight that has one of the ``scales`` must be int8.

    Returns the dtypes of the weights that are not quantized. Raises InputError, for a scale without a matrix
    UnexpectedTensor.
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
            found.add(_check_tensor(holder[parameter.name], parameter.name, parameter.shape, READ_DTYPES))
    for scale in left:
        raise UnexpectedTensor(
            f"{holder[scale].path} holds {scale}, the scale of a matrix that its configuration doesn't have."
        )
    return found


def _check_tensor(held: Held, name: str, expected: tuple[int, ...], dtypes: tuple[str, ...]) -> str:
    """Raise InputError for a tensor of another shape or dtype than expected. Returns its dtype."""
    shape, dtype = held.shape, held.dtype
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
