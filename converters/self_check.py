"""The self-check of a conversion: what it wrote, read back and compared with config.json by names, shapes and count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.console.errors import InputError
from converters.files.json_file import read_json
from converters.formats.compressed_layouts import layout_shapes
from converters.formats.safetensors import DTYPE_NAMES
from converters.formats.tensor_files import SafetensorsFile
from converters.model.config import ModelConfig
from converters.model.dtypes import DTYPES
from converters.model.families.hf_config import read_config
from converters.model.parameters import Parameter, check_names, parameters


@dataclass(frozen=True)
class SelfCheck:
    """How many tensors and parameters there are, and the digest of their names and shapes."""

    tensors: int
    parameters: int
    sha256: str

    def line(self) -> str:
        return (
            f"Self-check: {self.tensors} tensors, {self.parameters:,} parameters, names and shapes as config.json "
            f"calls for (sha256 {self.sha256[:16]})"
        )


def names_and_shapes(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """The hex sha256 over the lines ``name 2x3``, sorted: the same for a model in any dtype and number of files."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}\n" for name, shape in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_configuration(directory: Path) -> SelfCheck:
    """The self-check of a checkpoint without files of weights: what its config.json calls for."""
    table = parameters(_read(directory))
    return SelfCheck(len(table), sum(p.elements for p in table), names_and_shapes((p.name, p.shape) for p in table))


def check_files(directory: Path, files: list[str]) -> SelfCheck:
    """Compare the headers of the files on the disk with the config.json on the disk.

    Raises InputError, naming the first tensor that doesn't fit.
    """
    codes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        file = SafetensorsFile(directory / name)
        codes |= {tensor: file.code(tensor) for tensor in file.names()}
        shapes |= {tensor: file.shape(tensor) for tensor in file.names()}
    config = _read(directory)
    table = parameters(config)
    groups = _groups(directory, table)
    expected: dict[str, tuple[int, ...]] = {}
    owners: dict[str, str] = {}
    for parameter in table:
        suffixes = {"": parameter.shape}
        if parameter.name in groups:
            suffixes = layout_shapes(groups[parameter.name], parameter.shape)
        expected |= {parameter.name + suffix: shape for suffix, shape in suffixes.items()}
        owners |= dict.fromkeys((parameter.name + suffix for suffix in suffixes), parameter.name)
    check_names(config, {owners.get(name, name) for name in shapes}, str(directory))
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise InputError(
                f"{directory} holds the tensor {name} in shape {shapes.get(name)}, and its config.json calls for "
                f"{expected.get(name)}. Convert again with --force."
            )
    for parameter in table:
        if parameter.name not in groups and DTYPE_NAMES[codes[parameter.name]] not in DTYPES:
            raise InputError(
                f"{directory} holds the tensor {parameter.name} as {codes[parameter.name]}, and its config.json "
                "doesn't say that it is quantized. Convert again with --force."
            )
    return SelfCheck(len(shapes), sum(parameter.elements for parameter in table), names_and_shapes(shapes.items()))


def _groups(directory: Path, table: list[Parameter]) -> dict[str, dict[str, Any]]:
    """The config group that config.json has for each weight that it says is quantized, by the weight's name."""
    described = read_json(directory / "config.json").get("quantization_config")
    if described is None:
        return {}
    found = {}
    for parameter in table:
        module = parameter.name.removesuffix(".weight")
        if parameter.row.is_linear and module not in described["ignore"]:
            groups = described["config_groups"].values()
            found[parameter.name] = next(each for each in groups if {"Linear", module} & set(each["targets"]))
    return found


def _read(directory: Path) -> ModelConfig:
    return read_config(directory / "config.json", quantized=True)
