"""Inputs scaled by their importance before their weights are rounded, without changing what the model computes.

AWQ (Lin et al. 2023): where what makes a linear's inputs can be divided by s, input by input, and the linear's columns
multiplied by it, an input that is large on the text has its weights rounded in finer steps of their own, at the cost of
others in their group. s is the root of the input's mean square to the power alpha, from 0 (nothing moves) to 1; the
alpha is taken that costs the outputs least.

What is divided stays exact. A norm's weight n becomes n' = n / s as its dtype can hold it, and n / n' is what columns
are multiplied by. Where something else is divided that isn't quantized, a bias say, s is a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from converters.model.architecture import FeedForward
from converters.model.config import ModelConfig
from converters.model.parameters import Parameter, same_input
from converters.sources.source import TensorSource
from quantize.calibration.moments import Moments
from quantize.formats.weight_format import WeightFormat

if TYPE_CHECKING:
    import torch

_STEPS = 20  # from alpha 0 to 1
_ROWS, _STRETCH = 512, 32  # of a weight, that alpha is judged by: at most so many, in stretches


@dataclass(frozen=True)
class Place:
    """Where a block's inputs can be scaled. Names are within the block, without ``.weight``."""

    made_by: str  # a norm, or the linear whose outputs the inputs are or are multiples of
    taken_by: tuple[str, ...]  # linears


def places(config: ModelConfig) -> tuple[list[Place], list[str]]:
    """The places of each block, and in words what has to stay as it is."""
    architecture = config.architecture
    attention, feed_forward = same_input(architecture)
    out = f"self_attn.{architecture.attention_out}"
    found, left = [], []
    if architecture.norm_first and architecture.norm_weights:
        found += [Place(architecture.attention_norm, attention), Place(architecture.feed_forward_norm, feed_forward)]
    else:
        why = "are the residual stream too" if architecture.norm_weights else "come from norms without weights"
        left.append(f"those of {', '.join((*attention, *feed_forward))}, which {why}")
    if config.num_kv_heads == config.num_heads:
        found.append(Place("self_attn.v_proj", (out,)))
    else:
        left.append(f"those of {out}, since query heads share values")
    # Of SwiGLU's two factors only the second is linear; ReLU lets positive factors through.
    last = feed_forward[{FeedForward.SWIGLU: 1, FeedForward.RELU: 0}[architecture.feed_forward]]
    return [*found, Place(last, (architecture.feed_forward_out,))], left


def block_prefix(name: str, config: ModelConfig) -> str:
    """What the names of a parameter's block have in common; empty for a parameter of none."""
    before = f"{config.architecture.prefix}layers."
    return f"{before}{name.removeprefix(before).partition('.')[0]}." if name.startswith(before) else ""


@dataclass
class Change:
    """What becomes of a parameter: its columns times ``columns``, its rows by ``rows``, or other ``values``."""

    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    values: torch.Tensor | None = None


@dataclass
class Scaled:
    """One block's parameters after scaling, by name, and the alpha that was taken at each place."""

    changes: dict[str, Change] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def importance(self, name: str, moments: torch.Tensor) -> torch.Tensor:
        """What the errors of a weight's columns cost, by the ``moments`` of its inputs before they were scaled."""
        columns = self.changes[name].columns if name in self.changes else None
        return moments if columns is None else moments / columns.square()


class ScaledSource:
    """A source with the changes of the blocks that ``scaled`` has by prefix. All but ``rows`` is as the source's."""

    def __init__(self, source: TensorSource, scaled: Mapping[str, Scaled]) -> None:
        self._source, self._scaled = source, scaled
        self.config = source.config
        self.default_dtype, self.fingerprint = source.default_dtype, source.fingerprint
        self.files, self.auxiliary_files = source.files, source.auxiliary_files

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As the source's; scaled weights in float32."""
        scaled = self._scaled.get(block_prefix(name, self.config))
        change = None if scaled is None else scaled.changes.get(name)
        if change is None:
            return self._source.rows(name, start, stop)
        if change.values is not None:
            return change.values[start:stop]
        found = self._source.rows(name, start, stop).float()
        if change.columns is not None:
            found = found * change.columns
        return found if change.rows is None else found / change.rows[start:stop, None]


@dataclass(frozen=True)
class Scaler:
    """Finds how blocks of a source are scaled. ``formats`` has the linears to be quantized, ``kept`` those that stay
    bit for bit as the source has them.
    """

    source: TensorSource
    config: ModelConfig
    linears: Mapping[str, Parameter]
    formats: Mapping[str, WeightFormat]
    kept: frozenset[str]
    moments: Moments

    def scale(self, prefix: str) -> Scaled:
        """The block whose names begin with ``prefix``."""
        scaled = Scaled()
        for place in places(self.config)[0]:
            if self.can_scale(prefix, place):
                self._scale(prefix, place, scaled)
        return scaled

    def can_scale(self, prefix: str, place: Place) -> bool:
        """Whether a weight there is to be rounded, and none has to stay as it is."""
        taken_by = _weights(prefix, place.taken_by)
        stays = self.kept.intersection(taken_by) or f"{prefix}{place.made_by}.weight" in self.kept
        return not stays and any(self.formats[name].quantizes for name in taken_by)

    def _scale(self, prefix: str, place: Place, scaled: Scaled) -> None:
        """Put into ``scaled`` what the best alpha makes of a place, if it is better than none."""
        samples = {name: self._sample(name) for name in _weights(prefix, place.taken_by)}
        mean_square = self.moments.by_weight[next(iter(samples))]
        divided = self._divided(prefix, place)
        best, least, alpha = None, self._cost(samples, None), 0.0
        for step in range(1, _STEPS + 1):
            factors = _factors(mean_square, step / _STEPS)
            if self._must_be_exact(prefix, place):
                factors = _exact_factors(factors, divided.values())
            elif divided:
                factors = _norm_factors(factors, *divided.values())
            cost = self._cost(samples, factors)
            if cost < least:
                best, least, alpha = factors, cost, step / _STEPS
        scaled.alphas[place.made_by] = alpha
        if best is None:
            return
        for name in samples:
            scaled.changes.setdefault(name, Change()).columns = best
        if (name := f"{prefix}{place.made_by}.weight") in self.linears:
            scaled.changes.setdefault(name, Change()).rows = best
        for name, values in divided.items():
            scaled.changes[name] = Change(values=(values.float() / best).to(values.dtype))

    def _must_be_exact(self, prefix: str, place: Place) -> bool:
        """Whether what is divided is neither rounded anyway nor a single vector, whose rounding columns make up for."""
        name, architecture = f"{prefix}{place.made_by}.weight", self.config.architecture
        if name in self.linears:
            return architecture.biases or not self.formats[name].quantizes
        return len(architecture.norm.value) > 1

    def _divided(self, prefix: str, place: Place) -> dict[str, torch.Tensor]:
        """The vectors, by name, that are divided, in the dtype that they are stored in."""
        import torch

        name, architecture = prefix + place.made_by, self.config.architecture
        is_linear = f"{name}.weight" in self.linears
        kinds = (
            (["bias"] if architecture.biases else []) if is_linear else [kind for kind, _ in architecture.norm.value]
        )
        length = self.linears[f"{prefix}{place.taken_by[0]}.weight"].shape[1]
        dtype = getattr(torch, self.config.dtype)
        return {f"{name}.{kind}": self.source.rows(f"{name}.{kind}", 0, length).to(dtype) for kind in kinds}

    def _sample(self, name: str) -> torch.Tensor:
        """Rows of a weight, spread evenly over all, in float32."""
        import torch

        return torch.cat([self.source.rows(name, *rows).float() for rows in _stretches(self.linears[name].shape[0])])

    def _cost(self, samples: Mapping[str, torch.Tensor], factors: torch.Tensor | None) -> float:
        """The mean square of the outputs' errors, summed over outputs, as far as the moments and the rows tell."""
        total = 0.0
        for name, rows in samples.items():
            importance = self.moments.by_weight[name]
            if factors is not None:
                rows, importance = rows * factors, importance / factors.square()
            form = self.formats[name]
            difference = form.decode(form.encode(rows, importance=importance).tensors).float() - rows
            errors = (difference.double().square() * importance.double()).sum(1)
            # Sums that do not depend on the number of threads: the choice must not.
            total += math.fsum(errors.tolist()) * self.linears[name].shape[0] / len(rows)
        return total


def _stretches(count: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, evenly spread, of _ROWS in all; all rows where there are no more."""
    if count <= _ROWS:
        yield 0, count
        return
    number = _ROWS // _STRETCH
    for each in range(number):
        start = each * (count - _STRETCH) // (number - 1)
        yield start, start + _STRETCH


def _factors(mean_square: torch.Tensor, alpha: float) -> torch.Tensor:
    """float32 [in]: root mean squares to the power of alpha, about 1 in the mean; 1 where an input is always zero."""
    logarithms = mean_square.double().log().div_(2)
    known = logarithms.isfinite()
    mean = math.fsum(logarithms[known].tolist()) / max(1, int(known.sum()))
    return ((logarithms - mean) * alpha).exp().where(known, 1.0).float()


def _norm_factors(factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """By what a norm's ``weight`` is divided when its dtype has rounded the quotient; 1 where that leaves nothing."""
    quotient = (weight.float() / factors).to(weight.dtype).float()
    return (weight.float() / quotient).where((quotient != 0) & quotient.isfinite(), 1.0)


def _exact_factors(factors: torch.Tensor, divided: Iterable[torch.Tensor]) -> torch.Tensor:
    """The nearest powers of two; 1 where they would leave the range in which they divide exactly."""
    import torch

    factors = torch.exp2(torch.log2(factors).round())
    for values in divided:
        same = (values / factors.to(values.dtype)).float() * factors == values.float()
        factors = factors.where(same, 1.0)
    return factors


def _weights(prefix: str, names: Iterable[str]) -> list[str]:
    return [f"{prefix}{name}.weight" for name in names]
