"""Opening a Hugging Face directory: safetensors or torch's .bin, in one file or an indexed set, of any method."""

from __future__ import annotations

from pathlib import Path

from converters.console.errors import InputError
from converters.console.notes import note
from converters.files.json_file import read_json
from converters.model.config import ModelConfig
from converters.model.dtypes import READ_DTYPES, said_dtype, widest
from converters.model.families.hf_config import read_config
from converters.model.parameters import LM_HEAD, check_names, parameters
from converters.sources.huggingface.files import weight_files
from converters.sources.huggingface.holding import hold
from converters.sources.huggingface.plain_source import HFSource
from converters.sources.huggingface.quantized.registry import find_method
from converters.sources.huggingface.quantized.source import quantized_source
from converters.sources.huggingface.surplus import Held, settle_head


def open_hf(directory: Path) -> HFSource:
    """Open a Hugging Face directory and check its tensors against the parameter table.

    Raises InputError for an unreadable or unsafe file, for a tensor of another shape or of a type that isn't read, and
    for what isn't read of quantized weights; for names its subclasses UnmappedTensor, UnexpectedTensor, MissingTensor
    and DuplicateTensor.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} does not exist or is no directory.")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} is no checkpoint: it has no config.json, nor Meta's params.json.")
    fields = read_json(directory / "config.json")
    method = find_method(fields, str(directory))
    config = read_config(directory / "config.json", quantized=method is not None)
    holder, parts = hold(weight_files(directory, fields), config, method)
    config = settle_head(config, holder, quantized=LM_HEAD.name in parts)
    check_names(config, [*holder, *parts], str(directory))
    found = _check_tensors(config, holder)
    if "float64" in found:
        note(f"{directory} holds tensors of float64, which are read as float32.")
    config = config.with_dtype(widest(found))
    if method is None:
        return HFSource(directory, config, holder, found, said_dtype(fields))
    return quantized_source(directory, config, method, holder, parts, (found, said_dtype(fields)))


def _check_tensors(config: ModelConfig, holder: dict[str, Held]) -> set[str]:
    """Check shapes and dtypes of what isn't quantized. Returns the dtypes. Raises InputError."""
    found = set()
    for parameter in parameters(config):
        if parameter.name in holder:
            found.add(_check_tensor(holder[parameter.name], parameter.name, parameter.shape))
    return found


def _check_tensor(held: Held, name: str, expected: tuple[int, ...]) -> str:
    """Raise InputError for a tensor of another shape or dtype than expected. Returns its dtype."""
    shape, dtype = held.shape, held.dtype
    if shape != expected:
        raise InputError(
            f"{held.path}: the tensor {name} is of shape {list(shape)}, but config.json calls for {list(expected)}."
        )
    if dtype not in READ_DTYPES:
        raise InputError(
            f"{held.path}: the tensor {name} is of type {dtype}; this tool reads {', '.join(READ_DTYPES)} there. "
            "Convert the unquantized original."
        )
    return dtype
