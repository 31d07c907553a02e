"""int8 weights in the compressed-tensors layout: how config.json describes it, and what the values mean.

The layout (format "int-quantized", https://github.com/vllm-project/compressed-tensors): ``<name>.weight`` int8
[out, in] and ``<name>.weight_scale`` [out, 1]; the weight is their product.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError, shown
from converters.console.notes import note
from converters.model.config import ModelConfig
from converters.model.parameters import LM_HEAD, parameters

if TYPE_CHECKING:
    import torch

SCALE_SUFFIX = "_scale"  # after the name of the weight
_METHOD, _FORMAT = "compressed-tensors", "int-quantized"
_SEVERAL_FORMATS = "mixed-precision"  # in place of a format where groups have different ones


def weights_group(
    layout: str, kind: str, bits: int, group_size: int | None = None, zero_points: bool = False
) -> dict[str, Any]:
    """What ``config_groups`` says of weights: ``layout`` is one of compressed-tensors' formats, ``kind`` int or float.

    With a ``group_size`` there is a scale for so many inputs, else one per output channel.
    """
    weights = {"num_bits": bits, "type": kind, "symmetric": not zero_points, "strategy": "channel", "dynamic": False}
    if group_size is not None:
        weights |= {"strategy": "group", "group_size": group_size}
    return {"format": layout, "weights": weights}


INT8_GROUP = weights_group(_FORMAT, "int", 8)
# Default values of the fields of ``weights``, and fields that only say how the scales were found.
_WEIGHT_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
_HOW_MADE = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
# Fields beside it that don't change a weight's value. Whether a linear is quantized is seen from its tensors, so the
# fields about that (targets, ignore, quantization_status) are not needed.
_HARMLESS = ("quant_method", "format", "config_groups", "ignore", "quantization_status", "global_compression_ratio",
             "run_compressed", "version")  # fmt: skip
_MAY_BE_EMPTY = ("sparsity_config", "transform_config")  # compressed-tensors fills other empty objects with defaults
_HARMLESS_IN_GROUP = ("targets", "weights", "format", "input_activations")


def quantization_config(
    config: ModelConfig, groups: Sequence[tuple[dict[str, Any], Collection[str]]]
) -> dict[str, Any]:
    """The ``quantization_config`` for config.json where weights are as ``groups`` say: each what it says, and of which.

    What it says are the ``format`` and the ``weights`` of a config group; of which, the names of weights. Every other
    linear is listed as ignored, even an output head that is tied to the embedding. One group is for all linears that
    are not; several list theirs.
    """
    linears = [LM_HEAD.name, *(parameter.name for parameter in parameters(config) if parameter.row.is_linear)]
    quantized = {name for _, names in groups for name in names}
    layouts = {group["format"] for group, _ in groups}
    return {
        "quant_method": _METHOD,
        "format": layouts.pop() if len(layouts) == 1 else _SEVERAL_FORMATS,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": ["Linear"] if len(groups) == 1 else _modules(names), **group}
            for number, (group, names) in enumerate(groups)
        },
        "ignore": _modules(name for name in dict.fromkeys(linears) if name not in quantized),
    }


def _modules(names: Iterable[str]) -> list[str]:
    """Of weights, the linears."""
    return [name.removesuffix(".weight") for name in names]


def is_int8(fields: Any, where: str) -> bool:
    """Whether the fields of the config.json in the folder ``where`` describe weights in this layout.

    Raises InputError, naming the field, for any other feature of compressed-tensors. Other quantization methods are
    left to the reader of the rest of config.json.
    """
    described = fields.get("quantization_config") if isinstance(fields, dict) else None
    if not isinstance(described, dict) or described.get("quant_method") != _METHOD:
        return False
    _check(where, {"format": described.get("format")}, {"format": (_FORMAT,)})
    _check_rest(where, described, _HARMLESS)
    groups = described.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refusal(where, f"config_groups {shown(groups)}")
    for name, group in groups.items():
        _check_group(where, name, group if isinstance(group, dict) else {})
    return True


def note_ignored(fields: dict[str, Any], where: str, linears: Iterable[str], quantized: Container[str]) -> None:
    """Note which ``linears`` (names of weights) are stored otherwise than ``ignore`` says; the stored form counts.

    Raises InputError where ``ignore`` is not a list of names and of regular expressions that begin with ``re:``.
    """
    patterns = fields["quantization_config"].get("ignore") or []
    if not isinstance(patterns, list):
        raise _refusal(where, f"ignore {shown(patterns)}")
    try:
        ignored = [_pattern(pattern) for pattern in patterns]
    except (AttributeError, TypeError, re.error):
        raise _refusal(where, f"ignore {shown(patterns)}") from None
    for name in linears:
        said = any(pattern.match(name.removesuffix(".weight")) for pattern in ignored)
        if said and name in quantized:
            note(f"{where}: config.json has {name} in ignore, but it is stored in int8 and read as such.")
        elif not said and name not in quantized:
            note(f"{where}: {name} is not stored in int8, though config.json doesn't have it in ignore.")


def _pattern(text: str) -> re.Pattern[str]:
    """The pattern for an entry of ``ignore``: a whole name, or a regular expression for the beginning of one."""
    expression = text.removeprefix("re:")
    return re.compile(expression if expression != text else re.escape(text) + r"\Z")


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in]: int8 values [out, in] times their scale [out, 1]."""
    return values.float() * scale.float()


def _check_group(where: str, name: str, group: dict[str, Any]) -> None:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _refusal(where, f"weights {shown(weights)} in {name}")
    given = {key: value for key, value in weights.items() if value is not None}
    if given.get("group_size") == -1:  # another way to say per channel
        given |= {"strategy": given.get("strategy", "channel")}
        del given["group_size"]
    _check(
        where,
        _WEIGHT_DEFAULTS | {"strategy": None} | given,
        {key: (value,) for key, value in INT8_GROUP["weights"].items()},
    )
    _check_rest(where, given, (*INT8_GROUP["weights"], *_HOW_MADE))
    _check(where, {"format": group.get("format")}, {"format": (None, _FORMAT)})
    _check_rest(where, group, _HARMLESS_IN_GROUP)
    activations = group.get("input_activations")
    if activations is None:
        return
    if not isinstance(activations, dict) or activations.get("dynamic") is not True:
        raise _refusal(where, "input_activations by scales that are stored (not dynamic)")
    note(
        f"{where} asks for activations in {shown(activations.get('num_bits'))} bits too (input_activations); that is "
        "ignored: it doesn't change the weights, and activations are not quantized."
    )


def _check(where: str, values: dict[str, Any], valid: dict[str, tuple[Any, ...]]) -> None:
    """Raise InputError for a field whose value is not one of its ``valid`` ones."""
    for key, allowed in valid.items():
        value = values.get(key)
        if not any(value == each and type(value) is type(each) for each in allowed):
            raise _refusal(where, f"{key} {shown(value)}")


def _check_rest(where: str, fields: dict[str, Any], known: Iterable[str]) -> None:
    """Raise InputError for a field that is not ``known`` and switches something on."""
    for key, value in fields.items():
        if key == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense":
            continue
        if key == "transform_config" and isinstance(value, dict) and not any(value.values()):
            continue
        if key in _MAY_BE_EMPTY and value == {}:
            continue
        if key not in known and value not in (None, False, []):
            raise _refusal(where, f"{key} {shown(value)}")


def _refusal(where: str, what: str) -> InputError:
    return InputError(
        f"{where}: config.json describes a model that is already quantized by {_METHOD!r} with {what}. This "
        f"tool reads only its format {_FORMAT!r}: symmetric int8, one scale per output channel. Convert the "
        "unquantized original."
    )
