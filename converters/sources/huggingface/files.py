"""Which files of a Hugging Face directory hold the weights: the ones that transformers would load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from converters.console.errors import InputError, MissingTensor, shown
from converters.console.notes import note
from converters.files.json_file import read_json
from converters.files.stand_ins import check_itself
from converters.formats.tensor_files import TensorFile, open_tensor_file
from converters.sources.huggingface.surplus import is_computed

INDEX = "model.safetensors.index.json"
# The first that exists counts, as in transformers: a directory may hold several formats, or remains of an older one.
_CANDIDATES = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_VARIANTS = ("model.*safetensors*", "pytorch_model.*bin*")  # such as other precisions: model.fp16.safetensors
_MAX_NAME_BYTES = 255


def weight_files(directory: Path, fields: dict[str, Any]) -> list[TensorFile]:
    """The files that hold a directory's weights, opened; ``fields`` are those of its config.json.

    Raises InputError where there are none, or one of an indexed set is missing; MissingTensor where the index lists a
    tensor that no file holds.
    """
    path = directory / _choose(directory, fields)
    return _indexed_files(path) if path.suffix == ".json" else [_open(path)]


def _choose(directory: Path, fields: dict[str, Any]) -> str:
    named = fields.get("transformers_weights")
    if named is not None:
        return _named(directory, named)
    there = [name for name in _CANDIDATES if (directory / name).is_file()]
    if not there:
        variants = sorted(path.name for pattern in _VARIANTS for path in directory.glob(pattern))
        only = f" It has {', '.join(variants[:3])}: give one of them such a name." if variants else ""
        raise InputError(f"{directory} is not a whole checkpoint: it has none of {', '.join(_CANDIDATES)}.{only}")
    if len(there) > 1:
        note(f"{directory} holds {' and '.join(there)}: {there[0]} is read, as by transformers.")
    return there[0]


def _named(directory: Path, name: Any) -> str:
    """The file that config.json itself names, which takes precedence over all others."""
    plain = _is_plain(name) and name.endswith((".safetensors", ".safetensors.index.json"))
    if not plain or not (directory / name).is_file():
        raise InputError(
            f"{directory}: config.json says that transformers_weights are in {shown(name)}; it must be a safetensors "
            "file, or an index of some, beside it."
        )
    return name


def _indexed_files(index: Path) -> list[TensorFile]:
    """The files that an index names, opened and checked to hold the tensors that it lists."""
    places = weight_map(index)
    files = {}
    for file_name in dict.fromkeys(places.values()):
        path = index.parent / file_name
        if not path.is_file():
            raise InputError(f"{index} names the file {file_name}, which is not there. Fetch it{_instead(index)}.")
        files[file_name] = _open(path)
    held = {name for file in files.values() for name in file.names()}
    for name, file_name in places.items():
        if name not in held and not is_computed(name):
            raise MissingTensor(f"{index} says that {file_name} holds the tensor {name}, but it does not.")
    return list(files.values())


def _instead(index: Path) -> str:
    """Advice for an index whose files can't be fetched."""
    later = _CANDIDATES[_CANDIDATES.index(index.name) + 1 :] if index.name in _CANDIDATES else ()
    there = [name for name in later if (index.parent / name).is_file()]
    return f", or take {index.name} away: then {there[0]} is read" if there else ", or convert again"


def _open(path: Path) -> TensorFile:
    check_itself(path)
    return open_tensor_file(path)


def weight_map(index: Path) -> dict[str, str]:
    """An index's map from tensor to file name. Raises InputError for a file outside the index's directory."""
    content: Any = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError(
            f"{index} has no weight_map, which says where each tensor is. Fetch it again, or "
            "remove it and give the weights in one file, model.safetensors."
        )
    for name, file_name in places.items():
        if not _is_plain(file_name) or not file_name.endswith((".safetensors", ".bin")):
            raise InputError(
                f"{index} places the tensor {name[:80]} in {str(file_name)[:80]!r}; it must be in the same folder."
            )
    return places


def _is_plain(name: Any) -> bool:
    """Whether it is the plain name of a file, not a path; spaces and punctuation are fine, hidden files aren't."""
    return (
        isinstance(name, str)
        and not name.startswith(".")
        and not re.search(r"[/\\\x00-\x1f\x7f]", name)
        and len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES
    )
