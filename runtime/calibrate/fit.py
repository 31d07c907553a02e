"""llama-quantize --fit: a format for every linear, so that the model fits a slice and loses the least.

What fits is weights, cache and the compiler's temporaries on each chip. What is lost is predicted weight by weight
(``quantize.calibration.losses``), the choice is a knapsack, and the compiler has the last word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from converters.console.errors import InputError
from converters.console.notes import note
from converters.console.progress import spinner
from converters.console.units import format_bytes
from converters.model.config import ModelConfig
from converters.model.parameters import Parameter
from quantize.calibration.calibrator import Fit, FitTarget
from quantize.calibration.knapsack import choose
from quantize.formats.floating import Floating
from quantize.formats.table import FORMATS
from quantize.shards.scheme import UNQUANTIZED, Scheme, choices, mixture
from quantize.shards.stored import StoredParameter
from runtime.model.decoder_tensors import of_same_input
from runtime.model.sizing import cache_bytes_per_chip, parameter_bytes_per_chip
from runtime.plan.chips import chip_of
from runtime.plan.plan import Workload
from runtime.run.buckets import DEFAULT_BUCKETS, usable_buckets

_TRIES = 5  # budgets, each smaller by what the compiler wanted beyond the last
_RESERVE = 0.05  # of the memory, for temporaries that no compiler counts
_CACHE_DTYPE = "bfloat16"


def candidates(config: ModelConfig, zero_points: bool) -> dict[str, list[str]]:
    """The formats that are tried for each linear of the layers: those whose groups divide its inputs."""
    suffix = "-zp" if zero_points else ""
    tried = [*(f"int4-g{size}{suffix}" for size in (128, 64, 32)), "int8", UNQUANTIZED]
    return {
        name: [each for each in tried if each == UNQUANTIZED or _divides(each, parameter)]
        for name, parameter in choices(config).items()
        if parameter.in_block
    }


def _divides(name: str, parameter: Parameter) -> bool:
    """Whether a weight's inputs are whole groups of a format."""
    size = FORMATS[name].group_size
    return size is None or parameter.shape[1] % size == 0


@dataclass(frozen=True)
class _Choices:
    """The weights that share an input, together: they are one product on the device, in one format."""

    weights: tuple[str, ...]
    formats: tuple[str, ...]
    costs: tuple[int, ...]  # bytes on each chip, by format
    losses: tuple[float, ...]


def check_fit(config: ModelConfig, target: FitTarget, zero_points: bool) -> None:
    """Raise InputError where not even the smallest formats fit, temporaries aside: known before any text is read."""
    losses = {name: dict.fromkeys(forms, 0.0) for name, forms in candidates(config, zero_points).items()}
    smallest, budget = _smallest(config, _choices(config, losses, target.chips)), _weights_at_most(config, target)
    if parameter_bytes_per_chip(config, smallest, target.chips) > budget:
        raise _too_large(config, smallest, target, budget)


def fit(config: ModelConfig, losses: Mapping[str, Mapping[str, float]], target: FitTarget) -> Fit:
    """The scheme that loses the least on ``target``, by the predicted ``losses`` of every weight's formats.

    Raises InputError where no choice fits.
    """
    groups, room = _choices(config, losses, target.chips), _Room(config, target)
    smallest = _smallest(config, groups)
    budget = room.for_weights(smallest)
    for _ in range(_TRIES):
        found = _choose(config, groups, target, budget)
        if found is None:
            raise _too_large(config, smallest, target, budget)
        scheme, numbers = found
        beyond = room.beyond(scheme)
        if beyond <= 0:
            predicted = sum(each.losses[number] for each, number in zip(groups, numbers, strict=True))
            held = parameter_bytes_per_chip(config, scheme, target.chips)
            return Fit(scheme, predicted, _table(groups, numbers), held, room.lines)
        budget -= beyond
    raise InputError(
        f"The TPU's compiler takes no mixture of {config.name} for {target.name} (the last one wanted "
        f"{format_bytes(beyond)} more). {_advice(target)}"
    )


def _choices(config: ModelConfig, losses: Mapping[str, Mapping[str, float]], chips: int) -> list[_Choices]:
    linears, found = choices(config), []
    for weights in _groups(config, list(losses)):
        formats = tuple(form for form in losses[weights[0]] if all(form in losses[name] for name in weights))
        costs = tuple(sum(_bytes(config, linears[name], form, chips) for name in weights) for form in formats)
        lost = tuple(sum(losses[name][form] for name in weights) for form in formats)
        found.append(_Choices(weights, formats, costs, lost))
    return found


def _groups(config: ModelConfig, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The weights in groups of those that take the same input."""
    found: dict[str, list[str]] = {}
    for name in names:
        first, *_ = of_same_input(name.removesuffix(".weight"), config)
        found.setdefault(first, []).append(name)
    return [tuple(each) for each in found.values()]


def _bytes(config: ModelConfig, parameter: Parameter, name: str, chips: int) -> int:
    """What a linear takes on each chip in a format, where all of its layer are in the same."""
    form = Floating(config.dtype) if name == UNQUANTIZED else FORMATS[name]
    stored = StoredParameter(parameter, form, form.group_size)
    return sum(tensor.spec(config, chips).nbytes for tensor in stored.tensors)


def _scheme(config: ModelConfig, groups: Sequence[_Choices], numbers: Sequence[int]) -> Scheme:
    formats = {name: each.formats[n] for each, n in zip(groups, numbers, strict=True) for name in each.weights}
    return mixture(config, formats)


def _smallest(config: ModelConfig, groups: Sequence[_Choices]) -> Scheme:
    return _scheme(config, groups, [each.costs.index(min(each.costs)) for each in groups])


def _choose(
    config: ModelConfig, groups: Sequence[_Choices], target: FitTarget, budget: int
) -> tuple[Scheme, list[int]] | None:
    """The scheme of the least loss whose parameters take at most ``budget`` bytes on each chip; None without one."""
    costs, losses = [each.costs for each in groups], [each.losses for each in groups]
    smallest = _smallest(config, groups)
    others = parameter_bytes_per_chip(config, smallest, target.chips) - sum(min(each.costs) for each in groups)
    left = budget - others
    while True:
        numbers = choose(costs, losses, left)
        if numbers is None:
            return None
        if config.dtype != "bfloat16" and all(
            each.formats[n] == UNQUANTIZED for each, n in zip(groups, numbers, strict=True)
        ):
            raise InputError(
                f"{config.name} fits {target.name} in {config.dtype} as it is: no weight needs a format. Shard it with "
                "--bf16, or fit it to less."
            )
        scheme = _scheme(config, groups, numbers)
        over = parameter_bytes_per_chip(config, scheme, target.chips) - budget
        if over <= 0:
            return scheme, numbers
        left -= over  # down's groups decide how gate and up are padded, which their own sizes don't know


def _weights_at_most(config: ModelConfig, target: FitTarget) -> int:
    """Bytes that weights may take on each chip, temporaries aside."""
    if target.slice is None:
        return target.weight_bytes
    fixed = (target.batch_size, target.max_seq_len, _CACHE_DTYPE)
    return chip_of(target.slice).hbm_bytes - cache_bytes_per_chip(config, target.chips, *fixed)


def _too_large(config: ModelConfig, smallest: Scheme, target: FitTarget, budget: int) -> InputError:
    return InputError(
        f"{config.name} doesn't fit {target.name}, not even in the smallest formats: they take "
        f"{format_bytes(parameter_bytes_per_chip(config, smallest, target.chips))} on each chip, and "
        f"{format_bytes(max(0, budget))} are left. {_advice(target)}"
    )


def _advice(target: FitTarget) -> str:
    if target.slice is None:
        return "Give a larger size, or more --chips."
    return "Give a larger slice, or less --batch-size or --max-seq-len."


class _Room:
    """The memory of a target's chips, and what of it weights don't get."""

    def __init__(self, config: ModelConfig, target: FitTarget) -> None:
        self._config, self._target = config, target
        self.lines: list[str] = []
        self._asks = target.slice is not None and find_spec("libtpu") is not None
        if target.slice is not None and not self._asks:
            note(
                f"The TPU's compiler is not installed: {_RESERVE:.0%} of the memory are kept free for its temporaries, "
                "an estimate. With pip install 'llama-tpu-toolchain[tpu]' it is asked."
            )

    def for_weights(self, smallest: Scheme) -> int:
        """Bytes for parameters on each chip, where the compiler's temporaries are those of the scheme ``smallest``."""
        target, most = self._target, _weights_at_most(self._config, self._target)
        if target.slice is None:
            return most
        if not self._asks:
            return int(most - _RESERVE * chip_of(target.slice).hbm_bytes)
        return parameter_bytes_per_chip(self._config, smallest, target.chips) - self.beyond(smallest)

    def beyond(self, scheme: Scheme) -> int:
        """By how many bytes the compiled programs need more than a chip has; not above 0 where they fit."""
        if not self._asks:
            return 0
        from runtime.plan.compiled_plan import compile_plan

        target, slice_ = self._target, self._target.slice
        workload = Workload(self._config, scheme, target.batch_size, target.max_seq_len, _CACHE_DTYPE)
        hbm = chip_of(slice_).hbm_bytes
        over = workload.on(slice_.devices).held_bytes - hbm
        if over > 0:
            return over
        buckets = usable_buckets(DEFAULT_BUCKETS, target.max_seq_len)[-1:]
        with spinner(f"Compiling for {slice_.name}"):
            compiled = compile_plan(workload, slice_, buckets)
        graphs = [compiled.step, *compiled.buckets.values(), *filter(None, [compiled.later_section])]
        if any(each.program is None for each in graphs):
            return int(0.03 * hbm)  # the compiler says that it is too much, not in figures
        peak = max(each.program.peak_bytes for each in graphs)
        temporaries = max(each.program.temp_bytes for each in graphs)
        self.lines = [
            f"By the TPU's compiler each chip of {slice_.name} needs {format_bytes(peak)} of its {format_bytes(hbm)}, "
            f"{format_bytes(temporaries)} of it for temporaries."
        ]
        return peak - hbm


def _table(groups: Sequence[_Choices], numbers: Sequence[int]) -> list[list[str]]:
    """By kind of linears, in how many layers they are in each format, with the bytes on each chip and the loss."""
    used = dict.fromkeys(form for each in groups for form in each.formats)
    kinds: dict[str, list[tuple[_Choices, int]]] = {}
    for each, number in zip(groups, numbers, strict=True):
        names = [name.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj") for name in each.weights]
        kinds.setdefault(", ".join(names), []).append((each, number))
    rows = [["linears", *used, "bytes per chip", "predicted loss"]]
    for kind, chosen in kinds.items():
        counts = Counter(each.formats[number] for each, number in chosen)
        held = sum(each.costs[number] for each, number in chosen)
        lost = sum(each.losses[number] for each, number in chosen)
        rows.append([kind, *(str(counts[form] or "") for form in used), format_bytes(held), f"{lost:.4f}"])
    return rows
