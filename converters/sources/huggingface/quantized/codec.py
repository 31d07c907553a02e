"""How one weight is stored that another tool has quantized, and what a method of quantization says of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from converters.console.errors import InputError
from converters.files.row_blocks import row_blocks
from converters.sources.codes import Coded, Coding
from converters.sources.huggingface.quantized.stripes import Stripes

if TYPE_CHECKING:
    import torch

    from converters.model.parameters import Parameter
    from converters.sources.huggingface.surplus import Held

SCALE_DTYPES = ("float32", "bfloat16", "float16")
_NARROW = ("bfloat16", "float16")  # of groups' scales, as they are kept


class Codec(Protocol):
    """How one weight [out, in] is stored. Its tensors are there, in the shapes and dtypes that the method calls for."""

    @property
    def title(self) -> str:
        """In words, as notes have it: "4 bits, groups of 128"."""
        ...

    @property
    def is_plain_int8(self) -> bool:
        """Whether it is int8 with a scale for each output and nothing else."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) dequantized: float32 [n, in]. Raises InputError for what stands for no number."""
        ...

    def coding(self) -> Coding | str:
        """How ``coded`` gives it, or in words why it doesn't. May read scales and zero points."""
        ...

    def coded(self, start: int, stop: int) -> Coded:
        """Rows [start, stop) as they are; only where there is a coding. Raises InputError as ``rows``."""
        ...


class Method(Protocol):
    """A method of quantization with the settings of one config.json."""

    title: str  # "GPTQ"
    fields: dict[str, Any]  # config.json's quantization_config
    suffixes: tuple[str, ...]  # of the tensors that a quantized linear has beside or in place of its ".weight"
    left_out: tuple[str, ...]  # of these, those that say nothing of the weights, but of activations
    exceptions: str  # the field of config.json that lists what is not quantized

    def codec(self, parameter: Parameter, tensors: Mapping[str, Held], stripes: Stripes) -> Codec:
        """How a weight is stored; ``tensors`` are what there is of it, by what follows its module's name.

        Raises InputError where they are not what the settings call for.
        """
        ...

    def leaves(self, module: str) -> bool:
        """Whether config.json says that a linear is not quantized."""
        ...


class OnlyRows:
    """What codecs have in common that only dequantize: ``why`` says what no format here has of theirs."""

    is_plain_int8 = False
    why: str

    def coding(self) -> Coding | str:
        return self.why

    def coded(self, start: int, stop: int) -> Coded:
        """Raises ValueError: there is no coding."""
        raise ValueError(f"rows {start} to {stop} can't be given as they are: {self.why}")


@dataclass
class IntegerCodec(ABC):
    """Integers of up to 8 bits with scales of groups of inputs; a method says where they are.

    All integers are less 2^(bits - 1), so that they fit int8.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group: int | None  # None: a scale for all inputs of an output
    scale_dtype: str
    zero_points: bool
    tensors: Mapping[str, Held] = field(repr=False)
    stripes: Stripes = field(repr=False)
    g_idx: torch.Tensor | None = field(default=None, repr=False)  # int64 [in]: inputs' groups, unless consecutive

    @abstractmethod
    def values(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the integers: int8 [n, in]."""

    @abstractmethod
    def scale(self, start: int, stop: int) -> torch.Tensor:
        """Of rows [start, stop), as stored: [n, groups]."""

    def zeros(self, start: int, stop: int) -> torch.Tensor | None:
        """Of rows [start, stop), int8 [n, groups]; None without zero points."""
        return None

    @property
    def groups(self) -> int:
        return 1 if self.group is None else -(-self.shape[1] // self.group)

    @property
    def title(self) -> str:
        groups = "a scale for each output" if self.group is None else f"groups of {self.group}"
        zeros = ", zero points" if self.zero_points else ""
        return f"{self.bits} bits, {groups}{zeros}" + (", act-order" if self.g_idx is not None else "")

    @property
    def is_plain_int8(self) -> bool:
        return self.bits == 8 and self.group is None and not self.zero_points

    def rows(self, start: int, stop: int) -> torch.Tensor:
        values, zeros = self.values(start, stop).float(), self.zeros(start, stop)
        if zeros is not None:
            values -= self._by_input(zeros.float())
        return values.mul_(self._by_input(self.scale(start, stop).float()))

    def coding(self) -> Coding | str:
        if self.g_idx is not None:
            return "act-order spreads its groups over the inputs"
        if self.group is not None and self.shape[1] % self.group:
            return f"its {self.shape[1]} inputs are no multiple of {self.group}"
        scales = kept_scales(self.group, self.scale_dtype, self._all_scales)
        if scales is None:
            return "neither bfloat16 nor float16 holds its scales, which are float32"
        return Coding("int8" if self.bits > 4 else "int4", self.group, self._has_zeros(), scales)

    def coded(self, start: int, stop: int) -> Coded:
        return Coded(self.values(start, stop), self.scale(start, stop), self.zeros(start, stop))

    def _by_input(self, columns: torch.Tensor) -> torch.Tensor:
        return by_input(columns, self.shape[1], self.group, self.g_idx)

    def _has_zeros(self) -> bool:
        """Whether a zero point may be another than 0; reads them where a method has some that say nothing."""
        return self.zero_points

    def _all_scales(self) -> Iterator[torch.Tensor]:
        for block in row_blocks(0, self.shape[0], self.groups):
            yield self.scale(*block)


def by_input(columns: torch.Tensor, inputs: int, group: int | None, g_idx: torch.Tensor | None = None) -> torch.Tensor:
    """Of what stands for groups of inputs, [n, groups], a column for every input, [n, in]; [n, 1] for one group.

    Groups are of ``group`` consecutive inputs, of which the last may have fewer, or as ``g_idx`` [in] says.
    """
    if g_idx is not None:
        return columns[:, g_idx]
    if columns.shape[1] == 1:
        return columns
    return columns[:, :, None].expand(-1, -1, group).flatten(1)[:, :inputs]


def kept_scales(group: int | None, dtype: str, blocks: Callable[[], Iterator[torch.Tensor]]) -> str | None:
    """The dtype in which a format of ours holds scales of this ``dtype`` as they are; None where there is none."""
    import torch

    if group is None:
        return "float32"
    if dtype in _NARROW:
        return dtype
    for narrow in _NARROW:
        if all(torch.equal(block.to(getattr(torch, narrow)).to(block.dtype), block) for block in blocks()):
            return narrow
    return None


def need(tensors: Mapping[str, Held], part: str, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Held:
    """One of a weight's tensors, of the ``shape`` and one of the ``dtypes`` that its method calls for.

    Raises InputError where it isn't there, or is another.
    """
    if part not in tensors:
        there = ", ".join(sorted(tensors)) or "nothing"
        raise InputError(
            f"{name}: config.json's quantization_config calls for the tensor {part}, but there is only {there}. One of "
            "the two is of another method, or a file is missing."
        )
    held = tensors[part]
    if held.shape != shape:
        raise InputError(
            f"{held.path}: the tensor {held.name} is of shape {list(held.shape)}, but config.json calls for "
            f"{list(shape)}."
        )
    if held.dtype not in dtypes:
        raise InputError(
            f"{held.path}: the tensor {held.name} is of type {held.dtype}; config.json calls for {' or '.join(dtypes)}."
        )
    return held


def only(tensors: Mapping[str, Held], parts: tuple[str, ...]) -> None:
    """Raise InputError for one of a weight's tensors that its settings don't call for."""
    for part, held in tensors.items():
        if part not in parts:
            raise InputError(
                f"{held.path}: the tensor {held.name} is none that config.json's quantization_config calls for "
                f"({', '.join(parts)}): one of the two is of another method."
            )
