"""The only module that uses torch_xla: functions of tensors are traced, as programs for XLA's compiler.

Nothing is executed here, but for the baseline of llama-bench: pjrt.py compiles the traced programs and runs them. A
trace needs neither chips nor memory for its tensors, so llama-plan and llama-run compile the same program.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from converters.console.errors import InputError
from runtime.model.kv_cache import SLOT_AXIS, FunctionalKVCache


@dataclass(frozen=True)
class TracedTensor:
    """An input or a result of a traced program, over all chips together.

    The dtype of an input is that of its values on the chips, which ``traced_as`` may have turned into another.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None  # along which it is split over the chips; None where every chip has all of it


# Dtypes of chips that torch_xla lacks, by those that graphs are traced with in their place: the program converts such
# an input first, which TPUs' compilers fuse into what uses it.
_TRACED_AS = {torch.int4: torch.int8}


def traced_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype as which a graph knows an input whose values have this dtype on the chips."""
    return _TRACED_AS.get(dtype, dtype)


@dataclass(frozen=True)
class TracedGraph:
    """A program for a compiler, before any of its passes.

    Its last results replace, in order, the inputs with the indices ``donated``, over which they may be written. The
    graph of torch_xla that ``lower`` holds is freed with this object.
    """

    fingerprint: str  # sha256 of its HLO, the same in all processes with the same torch and torch_xla
    inputs: tuple[TracedTensor, ...]
    results: tuple[TracedTensor, ...]
    donated: tuple[int, ...]
    constants: dict[int, torch.Tensor]  # the inputs whose values the function itself determines, by index
    lower: Callable[[], bytes] = field(repr=False, compare=False)  # what gives the module

    @property
    def order(self) -> list[int]:
        """The inputs but for the constants, those that it donates last, in the order of the results: a program takes
        them so.
        """
        others = {*range(len(self.inputs))} - {*self.donated} - {*self.constants}
        return [*sorted(others), *self.donated]

    @cached_property
    def module(self) -> bytes:
        """StableHLO as a portable artifact, which later versions of the compiler read as well. It takes longer to make
        than the rest of a trace, and who has the program compiled needs none.
        """
        return self.lower()


@dataclass(frozen=True)
class Trace:
    """A traced function, with what is needed to call its program."""

    graph: TracedGraph
    arguments: dict[int, int]  # from the program's inputs to the function's tensors, by index
    held: dict[int, Any]  # what the placeholders among the program's inputs stand for, by index
    structure: pytree.TreeSpec  # of the function's results


class _Placeholder(NamedTuple):
    tensor: torch.Tensor  # kept, so that torch_xla doesn't give its id to another
    dtype: torch.dtype  # on the chips
    axis: int | None
    stands_for: Any


class Tracer:
    """Makes tensors without memory for a decoder to hold, and traces functions that use them."""

    def __init__(self) -> None:
        """Start torch_xla, on the CPU: a TPU is left to whatever runs the programs."""
        with _on_cpu():
            _placeholder((1,), torch.float32)
        self._placeholders: dict[int, _Placeholder] = {}  # by torch_xla's ids

    def placeholder(
        self, shape: Sequence[int], dtype: torch.dtype, axis: int | None, stands_for: Any = None
    ) -> torch.Tensor:
        """A tensor of this shape over all chips, which share it along ``axis`` or, with None, have all of it each.

        It has the dtype that ``traced_as`` gives for ``dtype``. ``stands_for`` is what ``Trace.held`` says of it.
        """
        tensor = _placeholder(shape, dtype)
        self._placeholders[_id(tensor)] = _Placeholder(tensor, dtype, axis, stands_for)
        return tensor

    def nbytes(self, tensor: torch.Tensor) -> int:
        """The bytes on all chips of what a placeholder of this tracer stands for, copies not counted."""
        dtype = self._placeholders[_id(tensor)].dtype
        return tensor.numel() // 2 if dtype == torch.int4 else tensor.numel() * dtype.itemsize

    def release(self) -> None:
        """Forget the placeholders. Functions that use them can't be traced any more."""
        self._placeholders.clear()

    def trace(self, function: Callable[..., Any], args: Sequence[Any], donates: int, exact: bool = False) -> Trace:
        """The program of ``function``, for arguments that are ``TracedTensor`` and lists of them.

        The last results replace the tensors of the argument with index ``donates``. With ``exact``, float32 products
        are not rounded to bfloat16. Raises RuntimeError where the results don't depend on a tensor of the arguments.
        """
        import torch_xla
        from torch_xla import _XLAC

        kinds, structure = pytree.tree_flatten(list(args))
        first = len(pytree.tree_leaves(list(args[:donates])))
        donated = range(first, first + len(pytree.tree_leaves(args[donates])))
        tensors = [_placeholder(kind.shape, kind.dtype) for kind in kinds]
        results, result_structure = pytree.tree_flatten(function(*pytree.tree_unflatten(tensors, structure)))
        keys, values = _XLAC._get_tensors_xla_device_data_node(results)  # in the order of XLA's parameters
        fingerprint = _fingerprint(results, exact)
        found = [TracedTensor(tuple(result.shape), result.dtype, None) for result in results]

        def lower() -> bytes:
            with _precision(exact):
                return _XLAC._get_stablehlo(results, str(torch_xla.device()), [], True)

        places = {_id(tensor): place for place, tensor in enumerate(tensors)}
        if missing := [place for key, place in places.items() if key not in keys]:
            raise RuntimeError(f"the traced program does not depend on its inputs {missing}")
        arguments = {index: places[key] for index, key in enumerate(keys) if key in places}
        held = {index: self._placeholders[key] for index, key in enumerate(keys) if key in self._placeholders}
        constants = {
            index: value.cpu() for index, value in enumerate(values) if index not in arguments and index not in held
        }
        given = {index: (kinds[place].dtype, kinds[place].axis) for index, place in arguments.items()}
        given |= {index: (placeholder.dtype, placeholder.axis) for index, placeholder in held.items()}
        others = len(found) - len(donated)
        by_place = {place: index for index, place in arguments.items()}
        graph = TracedGraph(
            fingerprint,
            inputs=tuple(
                TracedTensor(tuple(value.shape), *given.get(index, (value.dtype, None)))
                for index, value in enumerate(values)
            ),
            results=(*found[:others], *(kinds[place] for place in donated)),
            donated=tuple(by_place[place] for place in donated),
            constants=constants,
            lower=lower,
        )
        held = {index: placeholder.stands_for for index, placeholder in held.items()}
        return Trace(graph, arguments, held, result_structure)


def _fingerprint(results: Sequence[torch.Tensor], exact: bool) -> str:
    """The sha256 of the HLO that computes ``results``, which takes a fifth of the time that StableHLO does.

    torch_xla's own hash of its graph would be quicker still, but doesn't tell all graphs apart: it is the same for
    index_copy along one axis and another, and where operands are exchanged.
    """
    from torch_xla import _XLAC

    lowering = _XLAC.lowering.LoweringContext("fingerprint")
    with _precision(exact):
        lowering.build(list(results))
    return hashlib.sha256(lowering.hlo()).hexdigest()


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Have torch_xla take the CPU as its device, which it chooses once, by its environment."""
    asked = os.environ.get("PJRT_DEVICE")
    os.environ["PJRT_DEVICE"] = "CPU"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        yield
    finally:
        if asked is None:
            del os.environ["PJRT_DEVICE"]
        else:
            os.environ["PJRT_DEVICE"] = asked


# XLA's names of dtypes that torch_xla's own function for placeholders lacks, although its tensors have them.
_XLA_NAMES = {torch.float8_e4m3fn: "f8e4m3fn"}


def _placeholder(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    import torch_xla.core.xla_builder as xb
    from torch_xla import _XLAC

    if dtype in _XLA_NAMES:
        return _XLAC._xla_create_placeholder_tensor(xb.mkshape(_XLA_NAMES[dtype], tuple(shape)).shape)
    return xb.create_placeholder_tensor(tuple(shape), traced_as(dtype))


def _id(tensor: torch.Tensor) -> int:
    from torch_xla import _XLAC

    return _XLAC._xla_get_tensor_id(tensor)


@contextmanager
def _precision(exact: bool) -> Iterator[None]:
    """Lower the graphs within this context so that a TPU computes float32 products exactly, if ``exact``.

    That takes several bfloat16 products for each; by default a TPU computes one. torch_xla has one setting per process,
    which it applies when it lowers a graph to XLA's, but not to the products of einsum.
    """
    from torch_xla import _XLAC

    _XLAC._xla_set_mat_mul_precision("highest" if exact else "default")
    try:
        yield
    finally:
        _XLAC._xla_set_mat_mul_precision("default")


# The integer dtype that XLA:CPU's cache stores each float dtype as, and back.
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_OF_BITS = {bits: dtype for dtype, bits in _BITS.items()}


class StretchKVCache(FunctionalKVCache):
    """XLA:CPU's cache, in which a range of consecutive slots is written in place.

    index_copy is a scatter, which XLA:CPU compiles to a choice between old and new for every slot, on a copy of the
    cache. It keeps a dynamic-update-slice only for integers: in bfloat16 it converts the whole cache to float32, and in
    float32 it repeats the update for each reader, on a copy. So floats are stored as integers with the same bits.
    """

    @staticmethod
    def stored_as(dtype: torch.dtype) -> torch.dtype:
        return _BITS.get(dtype, dtype)

    def _write(self, whole: torch.Tensor, slots: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return _operation(_write_stretch)(whole, part.to(_OF_BITS.get(whole.dtype, whole.dtype)), slots)

    def _read(self, whole: torch.Tensor) -> torch.Tensor:
        return _operation(_as_float)(whole) if whole.dtype in _OF_BITS else whole


@cache
def _operation(lowering: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """An operation on tensors, made from its lowering, a function of torch_xla's ``xla_builder.Op``."""
    import torch_xla.core.xla_op_registry as xor

    return xor.register(lowering.__name__, lowering)


def _write_stretch(whole: Any, part: Any, slots: Any) -> Any:
    """``whole`` [B, H, S, D] with ``part`` [B, H, T, D] written from the first of ``slots`` [T] on."""
    import torch_xla.core.xla_builder as xb

    held = whole.shape().dtype
    if part.shape().dtype != held:
        part = part.bitcast(held)
    zero = xb.Op.scalar(whole.builder(), 0, dtype=xb.Type.S64)
    start = [zero] * len(whole.shape().sizes)
    start[SLOT_AXIS] = slots.slice_in_dim(0, 1, 0).reshape([])
    return whole.dynamic_update_slice(part, start)


def _as_float(bits: Any) -> Any:
    """The bfloat16 or float32 numbers with these ``bits``, in the same shape."""
    import torch_xla.core.xla_builder as xb

    return bits.bitcast({xb.Type.S16: xb.Type.BF16, xb.Type.S32: xb.Type.F32}[bits.shape().dtype])


def product_in_float32(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``float32_product``; torch's own product of bfloat16 would give its result that dtype."""
    from torch_xla import _XLAC

    batch = list(range(x.dim() - 2)) if x.dim() == y.dim() else []
    dimensions = (([x.dim() - 1], [y.dim() - 1]), (batch, batch) if batch else ())
    return _XLAC._xla_dot_general(x, y, dimensions, preferred_element_type=torch.float32)


def product_in_int32(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``int32_product``; torch's own product of int8 would give its result that dtype."""
    from torch_xla import _XLAC

    batch = list(range(x.dim() - 2))
    dimensions = (([x.dim() - 1], [y.dim() - 1]), (batch, batch) if batch else ())
    return _XLAC._xla_dot_general(x, y, dimensions, preferred_element_type=torch.int32)


def kept_in_shape(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor behind a barrier, which XLA moves no reshaping across."""
    from torch_xla import _XLAC

    _XLAC._xla_optimization_barrier_([tensor])  # in place
    return tensor


def to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Numbers that bfloat16 represents exactly, converted to it: as their float32's upper half, since XLA:CPU takes
    twice as long to round.
    """
    if values.dtype == torch.bfloat16:
        return values
    bits = _operation(_as_bits)(values.float())
    return _operation(_as_float)((bits >> 16).to(torch.int16))


def floats_of_half_bits(bits: torch.Tensor) -> torch.Tensor:
    """The float16 numbers with these bits, int16, in float32."""
    return _operation(_as_half)(bits).float()


def _as_half(bits: Any) -> Any:
    """The float16 numbers with these int16 ``bits``."""
    import torch_xla.core.xla_builder as xb

    return bits.bitcast(xb.Type.F16)


def _as_bits(floats: Any) -> Any:
    """The bits of float32 numbers, as int32."""
    import torch_xla.core.xla_builder as xb

    return floats.bitcast(xb.Type.S32)


def lazy_device(kind: str) -> torch.device:
    """One XLA device as LazyTensor provides it by default: without SPMD, and with every step traced again.

    ``kind`` is CPU or TPU. Raises InputError where torch_xla can't use it.
    """
    os.environ["PJRT_DEVICE"] = kind
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import torch_xla

    try:
        return torch_xla.device()
    except Exception as error:
        if kind == "CPU":
            raise
        reason = str(error).split(". ")[0].splitlines()[0]
        raise InputError(
            f"torch_xla can't use PJRT_DEVICE={kind} ({reason}). Unset PJRT_DEVICE, or set it to CPU to run on this "
            "machine's CPU."
        ) from error


def lazy_sync() -> None:
    """Compile and run what has been traced on ``lazy_device``, and wait until it is done."""
    import torch_xla

    torch_xla.sync(wait=True)


def lazy_compilations() -> int:
    """Graphs that ``lazy_sync`` has compiled so far in this process."""
    import torch_xla.debug.metrics as metrics

    data = metrics.metric_data("CompileTime")
    return data[0] if data else 0
