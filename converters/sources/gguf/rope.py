"""RoPE scaling in a GGUF file: a factor in the metadata, or LLaMA 3.1's rule as a table of divisors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from converters.console.errors import InputError, shown
from converters.formats.gguf_header import Metadata
from converters.formats.gguf_parts import GGUFTensor
from converters.model.config import ModelConfig
from converters.model.rope import LinearScaling, Llama3Scaling, RopeScaling, inverse_frequencies

TABLE = "rope_freqs.weight"  # float32 [head_dim / 2]: divisors of the unscaled frequencies
_LONG_TABLES = ("rope_factors_long.weight", "rope_factors_short.weight")
# Common to all models of LLaMA 3.1 to 3.3, only their factors differ. These three don't follow from the table alone.
_LOW, _HIGH, _ORIGINAL_POSITIONS = 1.0, 4.0, 8192
Rule = TypeVar("Rule", bound=RopeScaling)
_TOLERANCE = 1e-4  # the table was computed in float32; other rules differ by far more


def rope_scaling(metadata: Metadata, tensors: Mapping[str, GGUFTensor], config: ModelConfig) -> RopeScaling | None:
    """The RoPE scaling that a file asks for; ``config`` is the file's configuration without it.

    llama.cpp's converter writes LLaMA 3.1's rule as a divisor for each frequency; the largest one is the rule's factor.
    Raises InputError, naming the rule, for one that is not implemented.
    """
    path = metadata.path
    for name in _LONG_TABLES:
        if name in tensors:
            raise InputError(f"{path} asks for RoPE scaling of type 'longrope' ({name}), which is not implemented.")
    linear = _linear(metadata)
    if TABLE not in tensors:
        return linear
    if linear is not None:
        raise InputError(f"{path} asks for linear RoPE scaling and for that of {TABLE} at once.")
    divisors = _divisors(tensors[TABLE], config.head_dim)
    if all(divisor == 1 for divisor in divisors):
        return None
    scaling = _made(path, Llama3Scaling, max(divisors), _LOW, _HIGH, _ORIGINAL_POSITIONS)
    for plain, divisor in zip(inverse_frequencies(config), divisors, strict=True):
        if not math.isclose(plain / scaling.scale(plain), divisor, rel_tol=_TOLERANCE):
            raise InputError(
                f"{path} asks for RoPE scaling by a table ({TABLE}) that is not LLaMA 3.1's; only that one is "
                "implemented."
            )
    return scaling


def _linear(metadata: Metadata) -> LinearScaling | None:
    """The scaling in the metadata. As in llama.cpp, a factor without a type is linear, and 0 or 1 means none."""
    path, key = metadata.path, metadata.key("rope.scaling.type")
    kind = metadata.text(key, "linear")
    if kind not in ("none", "linear"):
        raise InputError(
            f"{path} asks for RoPE scaling of type {shown(kind)} ({key}); implemented: 'none', 'linear', "
            f"and LLaMA 3.1's by {TABLE}."
        )
    old = metadata.number(metadata.key("rope.scale_linear"), 0)
    factor = metadata.number(metadata.key("rope.scaling.factor"), old)
    return None if kind == "none" or factor in (0, 1) else _made(path, LinearScaling, factor)


def _made(path: Path, rule: Callable[..., Rule], *values: float) -> Rule:
    try:
        return rule(*values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _divisors(table: GGUFTensor, head_dim: int) -> list[float]:
    import gguf

    if table.shape != (head_dim // 2,) or table.type != gguf.GGMLQuantizationType.F32:
        raise InputError(
            f"{table.path} holds {TABLE} in shape {list(table.shape)} and type {table.type.name}; heads of {head_dim} "
            f"dimensions call for {[head_dim // 2]} and F32."
        )
    divisors = table.raw(0, head_dim // 2).tolist()
    if not all(math.isfinite(divisor) and divisor >= 1 for divisor in divisors):
        raise InputError(f"{table.path} holds {TABLE} with values below 1; give another file of the model.")
    return divisors
