"""Checkpoints in the layouts of compressed-tensors: several groups of linears, each with its own settings.

(https://github.com/vllm-project/compressed-tensors: ``quantization/quant_args.py``, ``compressors``)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError, shown
from converters.console.notes import note
from converters.sources.huggingface.quantized.codec import Codec
from converters.sources.huggingface.quantized.compressed_codecs import CODECS, LAYOUTS, Weights
from converters.sources.huggingface.quantized.settings import Settings
from converters.sources.huggingface.quantized.stripes import Stripes

if TYPE_CHECKING:
    from converters.model.parameters import Parameter
    from converters.sources.huggingface.surplus import Held

METHOD = "compressed-tensors"
_READS = (
    "of it the formats int-quantized, pack-quantized (4 and 8 bits), float-quantized (8 bits), nvfp4-pack-quantized "
    "and mxfp4-pack-quantized"
)
_SEVERAL_FORMATS = "mixed-precision"
_NAIVE = "naive-quantized"  # another name of int-quantized or float-quantized
_TOP = ("quant_method", "format", "config_groups", "ignore", "quantization_status", "global_compression_ratio",
        "run_compressed", "version")  # fmt: skip
_MAY_BE_EMPTY = ("sparsity_config", "transform_config")  # compressed-tensors fills other empty objects with defaults
_GROUP = ("targets", "weights", "format", "input_activations")
_WEIGHTS = ("num_bits", "type", "symmetric", "strategy", "dynamic", "group_size", "block_structure", "actorder",
            "observer", "observer_kwargs", "scale_dtype", "zp_dtype")  # fmt: skip
_CLASSES = ("Linear", "Embedding")  # that a target may name
# What belongs to activations, with scales that are stored.
_ACTIVATIONS = tuple(
    f"{which}_{part}" for which in ("input", "output") for part in ("scale", "zero_point", "global_scale")
)


class CompressedTensors:
    """A checkpoint in compressed-tensors' layouts: see ``Method``."""

    title = METHOD
    left_out = _ACTIVATIONS
    suffixes = (
        *(f"weight_{part}" for part in ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale")),
        *_ACTIVATIONS,
    )
    exceptions = "ignore"

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        """Raises InputError, naming it, for what isn't read."""
        self.fields = fields
        self._settings = Settings(where, METHOD, fields, _READS)
        self._check_top(fields)
        groups = fields.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            self._settings.refuse(f"config_groups {shown(groups)}")
        self._groups = [self._group(name, group if isinstance(group, dict) else {}) for name, group in groups.items()]
        self._ignored = _patterns(self._settings, "ignore", fields.get("ignore") or [])

    def codec(self, parameter: Parameter, tensors: Mapping[str, Held], stripes: Stripes) -> Codec:
        module = parameter.name.removesuffix(".weight")
        weights = self._weights_of(module, "Embedding" if parameter.row.looked_up else "Linear")
        return CODECS[weights.layout](parameter, weights, tensors, stripes)

    def leaves(self, module: str) -> bool:
        return any(pattern.match(module) for pattern in self._ignored)

    def _weights_of(self, module: str, class_name: str) -> Weights:
        """The settings of the group that names a module the most closely: by its name, by a pattern, by its class."""
        if len(self._groups) == 1:  # that a linear is quantized is seen from its tensors
            return self._groups[0][1]
        for closeness in range(3):
            for targets, weights in self._groups:
                if _matches(targets, module, class_name)[closeness]:
                    return weights
        raise InputError(
            f"{self._settings.where}: {module} is quantized, but no config group of config.json has it in its targets."
        )

    def _check_top(self, fields: dict[str, Any]) -> None:
        self._settings.among("format", (*LAYOUTS, _NAIVE, _SEVERAL_FORMATS))
        sparsity, transforms = fields.get("sparsity_config"), fields.get("transform_config")
        known = [*_TOP, *(key for key in _MAY_BE_EMPTY if fields.get(key) == {})]
        if isinstance(sparsity, dict) and sparsity.get("format") == "dense":
            known.append("sparsity_config")
        if isinstance(transforms, dict) and not any(transforms.values()):
            known.append("transform_config")
        self._settings.rest(known)

    def _group(self, name: str, group: dict[str, Any]) -> tuple[list[str], Weights]:
        """A config group's targets, and what it says of weights."""
        where, top = self._settings.where, self._settings
        weights = group.get("weights")
        if not isinstance(weights, dict):
            top.refuse(f"weights {shown(weights)} in {name}")
        of_group = Settings(where, METHOD, group, _READS)
        of_group.rest(_GROUP)
        layout = of_group.among("format", (*LAYOUTS, _NAIVE, top.fields["format"]), top.fields["format"])
        self._note_activations(group.get("input_activations"))
        targets = group.get("targets", ["Linear"])
        _patterns(top, "targets", targets)
        return targets, _read_weights(Settings(where, METHOD, weights, _READS), layout)

    def _note_activations(self, activations: Any) -> None:
        if activations is None:
            return
        if not isinstance(activations, dict) or not activations:
            self._settings.refuse(f"input_activations {shown(activations)}")
        stored = "" if activations.get("dynamic") is True else ", with scales that are stored"
        note(
            f"{self._settings.where} asks for activations in {shown(activations.get('num_bits'))} bits too "
            f"(input_activations{stored}); that is ignored: it doesn't change the weights, and activations are not "
            "quantized."
        )


def _read_weights(settings: Settings, layout: str) -> Weights:
    settings.rest(_WEIGHTS)
    bits, kind = settings.among("num_bits", (4, 8), 8), settings.among("type", ("int", "float"), "int")
    symmetric = settings.among("symmetric", (True, False), True)
    settings.among("dynamic", (False,), False)
    order = settings.among("actorder", (None, False, True, "group", "weight", "static", "dynamic"))
    if layout == _NAIVE:
        layout = f"{kind}-quantized"
    if layout == _SEVERAL_FORMATS:
        settings.refuse(f"format {layout!r} and a group that has no format of its own")
    rules = LAYOUTS[layout]
    if (kind, bits) not in rules.values:
        settings.refuse(f"num_bits {bits} and type {kind!r} in the format {layout!r}")
    if not symmetric and not rules.zero_points:
        settings.refuse("symmetric False")
    size, block = settings.fields.get("group_size"), settings.fields.get("block_structure")
    strategy = settings.fields.get("strategy")
    if strategy is None:
        strategy = "channel" if size == -1 else "group" if size is not None else "tensor"
    if strategy not in rules.strategies:
        settings.refuse(f"strategy {shown(strategy)} in the format {layout!r}")
    group = None
    if strategy in ("group", "tensor_group"):
        group = settings.whole("group_size")
    elif size not in (None, -1):
        settings.refuse(f"group_size {shown(size)} and strategy {strategy!r}")
    if (strategy == "block") != (block is not None) or (block is not None and not _is_block(block)):
        settings.refuse(f"block_structure {shown(block)} and strategy {strategy!r}")
    if order and (group is None or kind != "int"):
        settings.refuse(f"actorder {shown(order)} and strategy {strategy!r}")
    act_order = order in (True, "group", "dynamic")  # the others only say how scales were found
    return Weights(layout, kind, bits, not symmetric, strategy, group, tuple(block) if block else None, act_order)


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)


def _patterns(settings: Settings, key: str, entries: Any) -> list[re.Pattern[str]]:
    """The entries of ``ignore`` or ``targets``: whole names, or regular expressions for the beginning of one."""
    if not isinstance(entries, list):
        settings.refuse(f"{key} {shown(entries)}")
    try:
        return [_pattern(entry) for entry in entries]
    except (AttributeError, TypeError, re.error):
        settings.refuse(f"{key} {shown(entries)}")


def _pattern(text: str) -> re.Pattern[str]:
    expression = text.removeprefix("re:")
    return re.compile(expression if expression != text else re.escape(text) + r"\Z")


def _matches(targets: list[str], module: str, class_name: str) -> tuple[bool, bool, bool]:
    """Whether targets name a module, match its name, or name its class."""
    patterns = [target for target in targets if target.startswith("re:")]
    return module in targets, any(_pattern(each).match(module) for each in patterns), class_name in targets
