"""Which of GGUF's types each of a model's tensors gets, and how its values come about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.console.notes import note
from converters.exports.gguf_blocks import BLOCK, Q4_0, Q8_0, QUANTIZED
from converters.model.config import ModelConfig
from converters.model.parameters import Parameter, parameters
from converters.sources.codes import Coding

F16 = "F16"
TYPES = (*QUANTIZED, F16)  # that can be asked for
_OF_DTYPE = {"bfloat16": "BF16", "float16": F16, "float32": "F32"}


@dataclass(frozen=True)
class Planned:
    """A parameter, its type in the file, and the ``code`` of the integers that go there as they are; None: values."""

    parameter: Parameter
    type: str
    code: Coding | None = None


def plan_types(config: ModelConfig, codes: Mapping[str, Coding], wanted: str | None) -> list[Planned]:
    """The type of every parameter, in the table's order; ``codes`` are those of the weights that are quantized.

    Linears of the layers, and other weights that are quantized, get the type that is ``wanted``, or without one each
    the type for its code. F16 is for all matrices. Other weights stay in ``config.dtype``, vectors are float32. Says in
    a note what is quantized a second time, and what can't be quantized.
    """
    planned = [_plan(each, codes.get(each.name), wanted, config) for each in parameters(config)]
    again: dict[tuple[str, str], int] = {}
    for each in planned:
        code = codes.get(each.parameter.name)
        if code and not each.code:
            again[code.name, each.type] = again.get((code.name, each.type), 0) + 1
    for (name, type_name), count in again.items():
        how = "dequantized and quantized anew" if type_name in QUANTIZED else "dequantized"
        note(f"GGUF's {type_name} doesn't hold {name} as it is: {count} such weights are {how}.")
    return planned


def _plan(parameter: Parameter, code: Coding | None, wanted: str | None, config: ModelConfig) -> Planned:
    plain = _OF_DTYPE[config.dtype]
    if len(parameter.shape) == 1:
        return Planned(parameter, "F32")
    if wanted == F16:
        return Planned(parameter, F16)
    chosen = wanted if code or parameter.row.quantized else None
    if chosen is None and code:
        chosen = Q4_0 if fits(code, Q4_0) else Q8_0
    if chosen is None:
        return Planned(parameter, plain)
    if parameter.shape[1] % BLOCK:
        note(f"{parameter.name} has {parameter.shape[1]} inputs, no multiple of {BLOCK}: it is written in {plain}.")
        return Planned(parameter, plain)
    return Planned(parameter, chosen, code if code and fits(code, chosen) else None)


def fits(code: Coding, type_name: str) -> bool:
    """Whether a block of this type holds the integers of a code, less their zero points, and their scale."""
    if code.is_float or (code.group_size or BLOCK) % BLOCK:
        return False
    if type_name == Q4_0:
        return code.bits == 4 and not code.zero_points
    return code.bits == 4 or not code.zero_points
