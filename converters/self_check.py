"""The self-check of a conversion: what it wrote, read back and compared with config.json by names, shapes and count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from converters.console.errors import InputError
from converters.formats.compressed_tensors import SCALE_SUFFIX
from converters.formats.tensor_files import SafetensorsFile
from converters.model.config import ModelConfig
from converters.model.families.hf_config import read_config
from converters.model.parameters import check_names, parameters


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
    config = _read(directory)
    codes, shapes = {}, {}
    for name in files:
        file = SafetensorsFile(directory / name)
        codes |= {tensor: file.code(tensor) for tensor in file.names()}
        shapes |= {tensor: file.shape(tensor) for tensor in file.names()}
    weights = [name for name in shapes if not name.endswith(SCALE_SUFFIX)]
    check_names(config, weights, str(directory))
    expected = {parameter.name: parameter.shape for parameter in parameters(config)}
    for name in weights:
        if codes[name] == "I8":
            expected[name + SCALE_SUFFIX] = (expected[name][0], 1)
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise InputError(
                f"{directory} holds the tensor {name} in shape {shapes.get(name)}, and its config.json calls for "
                f"{expected.get(name)}. Convert again with --force."
            )
    count = sum(prod(shapes[name]) for name in weights)
    return SelfCheck(len(shapes), count, names_and_shapes(shapes.items()))


def _read(directory: Path) -> ModelConfig:
    return read_config(directory / "config.json", quantized=True)
