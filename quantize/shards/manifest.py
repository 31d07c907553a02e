"""shards.json: what a directory of shards holds. Written last; read back against config.json and the scheme."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.console.errors import InputError
from converters.files.json_file import read_json
from converters.files.whole import FileRecord
from converters.model.config import ModelConfig
from converters.output.record import read_file_record
from quantize.formats.table import CALIBRATED, FORMATS, RTN, methods_for
from quantize.formats.weight_format import WeightFormat
from quantize.shards.partition import MAX_CHIPS
from quantize.shards.scheme import UNQUANTIZED, Scheme, choices
from quantize.shards.stored import stored_tensors

FILE_NAME = "shards.json"
FORMAT_VERSION = 2
MIXTURE_VERSION = 3  # which also says what is in another format than the one that the others say
# Version 1 had only int8 with a scale per channel and bf16, and neither of the keys that tell formats of a kind apart.
_READ_VERSIONS = (1, FORMAT_VERSION, MIXTURE_VERSION)


@dataclass(frozen=True)
class Manifest:
    """The content of shards.json; ``files`` has the chips that are present, by number."""

    model: str
    chips: int
    scheme: Scheme
    source_fingerprint: str
    tensors: dict[str, dict[str, Any]]
    files: dict[int, FileRecord]
    method: str | None = None  # one of METHODS; None for formats without a choice
    calibration: dict[str, Any] | None = None  # the number of tokens and their digest; None where none were looked at

    def as_json(self) -> dict[str, Any]:
        """The content of the file."""
        weights, mixed = self.scheme.default_format, bool(self.scheme.overrides)
        return {
            "format_version": MIXTURE_VERSION if mixed else FORMAT_VERSION,
            "model": self.model,
            "chips": self.chips,
            "scheme": weights.kind,
            "group_size": weights.group_size,
            "zero_points": weights.zero_points,
            **({} if _like(weights)[0] is weights else {"format": weights.name}),
            "method": self.method,
            **({} if self.calibration is None else {"calibration": self.calibration}),
            "quantized_lm_head": self.scheme.quantize_lm_head,
            **({"formats": self.scheme.names_by_format} if mixed else {}),
            "source_fingerprint": self.source_fingerprint,
            "tensors": self.tensors,
            "files": {chip_file(chip, self.chips): record.as_json() for chip, record in sorted(self.files.items())},
        }


def chip_file(chip: int, chips: int) -> str:
    """``chip-03-of-08.safetensors``: chips are numbered from 0; the second number is how many there are."""
    return f"chip-{chip:02d}-of-{chips:02d}.safetensors"


def describe_tensors(config: ModelConfig, scheme: Scheme, chips: int) -> dict[str, dict[str, Any]]:
    """The manifest's entry for every tensor: shape before the split, dtype, shard axis, elements of padding on it."""
    return {
        tensor.name: {
            "shape": list(tensor.shape),
            "dtype": tensor.part.element,
            "shard_axis": tensor.shard,
            "padding": tensor.padding(config, chips),
        }
        for tensor in stored_tensors(config, scheme)
    }


def read_manifest(directory: Path, config: ModelConfig) -> Manifest:
    """Read shards.json and hold it against ``config``. Raises InputError, saying what doesn't fit."""
    path = directory / FILE_NAME
    content = read_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in _READ_VERSIONS or isinstance(version, bool):
        raise InputError(
            f"{path} is of format version {str(version)[:20]}; this tool reads versions up to {MIXTURE_VERSION}. "
            "Quantize the checkpoint again with this llama-quantize."
        )
    chips, scheme, files = content.get("chips"), _scheme(content), content.get("files")
    method, calibration = content.get("method"), content.get("calibration")
    texts = (content.get("model"), content.get("source_fingerprint"))
    sound = (
        type(chips) is int
        and 1 <= chips <= MAX_CHIPS
        and scheme is not None
        and method in methods_for(scheme.formats)
        and _is_calibration(calibration)
        and (method not in CALIBRATED or calibration is not None)
        and (method != RTN or calibration is None)
        and isinstance(files, dict)
        and all(isinstance(text, str) for text in texts)
    )
    if not sound:
        raise InputError(f"{path} is damaged. Fetch it again, or quantize the checkpoint again.")
    others = {name for name, _ in scheme.overrides} - choices(config).keys()
    tensors = {} if others else describe_tensors(config, scheme, chips)
    if others or content.get("tensors") != tensors:
        raise InputError(f"{path} lists other tensors than its config.json calls for; the two don't belong together.")
    return Manifest(texts[0], chips, scheme, texts[1], tensors, _read_files(path, files, chips), method, calibration)


def _is_calibration(found: Any) -> bool:
    if found is None:
        return True
    return (
        isinstance(found, dict)
        and found.keys() == {"tokens", "sha256"}
        and type(found["tokens"]) is int
        and found["tokens"] > 0
        and isinstance(found["sha256"], str)
        and re.fullmatch("[0-9a-f]{64}", found["sha256"]) is not None
    )


def _scheme(content: dict[str, Any]) -> Scheme | None:
    """The scheme that shards.json describes; None where it describes none, or not as ``as_json`` does."""
    weights, head, formats = _weight_format(content), content.get("quantized_lm_head"), content.get("formats")
    if weights is None or not isinstance(head, bool):
        return None
    if content["format_version"] != MIXTURE_VERSION:
        return Scheme(weights.name, head)
    known = {UNQUANTIZED, *(name for name, each in FORMATS.items() if each.quantizes)}
    if not (weights.quantizes and isinstance(formats, dict) and formats and formats.keys() <= known):
        return None
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in formats.values()):
        return None
    scheme = Scheme(weights.name, head, tuple((name, each) for each, names in formats.items() for name in names))
    return scheme if (scheme.quantize_lm_head, scheme.names_by_format) == (head, formats) else None


def _weight_format(content: dict[str, Any]) -> WeightFormat | None:
    """The format that shards.json names; None where it is none of the table."""
    said = (content.get("scheme"), content.get("group_size"), content.get("zero_points", False))
    for each in FORMATS.values():
        expected = (each.kind, each.group_size, each.zero_points)
        if said == expected and list(map(type, said)) == list(map(type, expected)):
            alike = _like(each)
            return {other.name: other for other in alike}.get(content["format"]) if "format" in content else alike[0]
    return None


def _like(weights: WeightFormat) -> list[WeightFormat]:
    """The formats of its kind, group size and zero points: the one that these alone stand for, and others."""
    keys = (weights.kind, weights.group_size, weights.zero_points)
    return [each for each in FORMATS.values() if (each.kind, each.group_size, each.zero_points) == keys] or [weights]


def _read_files(path: Path, files: dict[str, Any], chips: int) -> dict[int, FileRecord]:
    numbers = {chip_file(chip, chips): chip for chip in range(chips)}
    records = {}
    for name, entry in files.items():
        if name not in numbers:
            raise InputError(f"{path} lists the file {name[:80]!r}, which is not one of {chips} chips' files.")
        records[numbers[name]] = read_file_record(entry, path, name)
    return records
