"""Which tensor of a Hugging Face directory is which weight, or which part of one that is quantized."""

from __future__ import annotations

from typing import NamedTuple

from converters.console.errors import DuplicateTensor, UnmappedTensor
from converters.formats.tensor_files import TensorFile
from converters.model.architecture import Architecture
from converters.model.config import ModelConfig
from converters.model.families.registry import family_of
from converters.model.parameters import is_known, parameters
from converters.sources.huggingface.quantized.codec import Method
from converters.sources.huggingface.quantized.registry import methods_with
from converters.sources.huggingface.surplus import (
    Held,
    biased_weight,
    is_computed,
    is_zero,
    note_left_out,
    same_bytes,
)

_BASE = "model."  # begins tensors' names; missing where the model was saved without its head
_WEIGHT = ".weight"


class Holding(NamedTuple):
    """Where weights are stored: by name, those that are as they are; and those that are quantized, tensor by tensor.

    The tensors of a quantized weight are by what follows the name of its module: "weight_scale".
    """

    plain: dict[str, Held]
    quantized: dict[str, dict[str, Held]]


def hold(files: list[TensorFile], config: ModelConfig, method: Method | None) -> Holding:
    """Where each of the model's weights is stored. Tensors that it doesn't need are left out, with a note.

    Raises UnmappedTensor for a name that neither the model nor ``method`` has, and DuplicateTensor for a tensor that is
    stored twice with different values.
    """
    needed, whole = {parameter.name for parameter in parameters(config)}, family_of(config.architecture).architecture
    found = Holding({}, {})
    computed, zeros, twice, activations = [], [], [], []
    for held in (Held(file, stored) for file in files for stored in file.names()):
        name, (weight, part) = _whole_name(held.name, whole), _part(held.name, method, whole)
        if is_computed(name):
            computed.append(held.name)
        elif method is not None and part in method.left_out:
            activations.append(held.name)
        elif weight is None and name not in needed and is_known(biased_weight(name), whole) and is_zero(held):
            zeros.append(held.name)
        elif weight is None and not is_known(name, whole):
            raise UnmappedTensor(
                f"{held.path} holds the tensor {name}, which is not part of a model of {whole.title}"
                f"{_stranger(name, method)}."
            )
        elif _add(
            held, name, *((found.plain, name) if weight is None else (found.quantized.setdefault(weight, {}), part))
        ):
            twice.append(held.name)
    for weight in found.quantized.keys() & found.plain.keys():
        found.quantized[weight]["weight"] = found.plain.pop(weight)
    note_left_out(computed, "buffers that follow from config.json")
    note_left_out(activations, "scales of activations, which are not quantized here")
    note_left_out(zeros, "biases of zeros, which config.json doesn't ask for")
    note_left_out(twice, "held twice, with the same values")
    return found


def _add(held: Held, name: str, place: dict[str, Held], key: str) -> bool:
    """Put a tensor in its place. Returns whether it is there already, with the same values; raises DuplicateTensor."""
    first = place.setdefault(key, held)
    if first is not held and not same_bytes(first, held):
        raise DuplicateTensor(
            f"The tensor {name} is held twice, with other values: by {first.path} and by {held.path}."
        )
    return first is not held


def _whole_name(stored: str, architecture: Architecture) -> str:
    """A tensor's name in a whole model. Models saved without their head, like OPT-66B, lack the prefix "model."."""
    based = _BASE + stored
    known = any(is_known(name, architecture) for name in (based, biased_weight(based)))
    return based if known else stored


def _part(stored: str, method: Method | None, architecture: Architecture) -> tuple[str | None, str]:
    """The weight that a tensor is one of the method's tensors of, and what follows the module's name; or None."""
    for suffix in method.suffixes if method else ():
        if stored.endswith(f".{suffix}"):
            weight = _whole_name(stored.removesuffix(f".{suffix}") + _WEIGHT, architecture)
            if is_known(weight, architecture):
                return weight, suffix
    return None, ""


def _stranger(name: str, method: Method | None) -> str:
    """Where other methods have tensors of such a name, which they are and what config.json says instead."""
    others = [title for title in methods_with(name) if method is None or title != method.title]
    if not others:
        return ""
    said = f"says {method.title}" if method else "doesn't say that weights are quantized"
    return f": it is one of those of {' or '.join(others)}, and config.json {said}"
