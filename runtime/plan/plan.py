"""What a model needs from a TPU, before any of its weights exist: sizes, whether a slice holds it, the roofline.

A chip is here what holds one shard: a device, of which tpu7x's chips have two (``quantize/slices.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from converters.console.errors import InputError
from converters.console.units import format_bytes
from converters.model.config import ModelConfig
from quantize.shards.partition import MAX_CHIPS, check_chips
from quantize.shards.scheme import Scheme
from quantize.slices import GENERATIONS, Slice, device_word
from runtime.model.sizing import (
    cache_bytes_per_chip,
    decode_bytes_per_chip,
    min_chips,
    parameter_bytes_per_chip,
    parameter_count,
)
from runtime.plan.chips import CHIPS, chip_of, slices_of

# The generation whose chips are counted by the post's Table 2 and by a plan without a target.
DEFAULT_GENERATION = "v4"

_COUNTS_TRIED = 64  # chip counts above the fewest; a placement is computed for each


@dataclass(frozen=True)
class Placement:
    """What each of ``chips`` chips holds and reads, in bytes, padding included."""

    chips: int
    parameter_bytes: int
    cache_bytes: int
    decode_bytes: int

    @property
    def held_bytes(self) -> int:
        return self.parameter_bytes + self.cache_bytes

    def fits(self, slice_: Slice) -> bool:
        """Whether weights and cache are no larger than a chip's HBM, counted as in ``chips.Chip``.

        XLA's temporaries are not included: they depend on the batch and the bucket, and only the compiler knows them.
        """
        return self.held_bytes <= chip_of(slice_).hbm_bytes

    def roofline_ms(self, slice_: Slice) -> float:
        """The least time of a decode step, in ms: reading every byte it needs from HBM once, and nothing else."""
        return 1000 * self.decode_bytes / chip_of(slice_).hbm_bandwidth


@dataclass(frozen=True)
class Workload:
    """A model in the scheme in which it is served, and the fixed shape of its cache; ``cache_dtype`` is one of
    CACHE_DTYPES.
    """

    config: ModelConfig
    scheme: Scheme
    batch_size: int
    max_seq_len: int
    cache_dtype: str = "bfloat16"
    activations: str = "auto"  # one of ACTIVATIONS

    @property
    def parameters(self) -> int:
        return parameter_count(self.config)

    @cached_property
    def unsplit(self) -> Placement:
        """All of it on one chip, where nothing is padded."""
        return self.on(1)

    def on(self, chips: int) -> Placement:
        """Split over ``chips`` chips as llama-quantize splits it. Raises InputError as ``check_chips`` does."""
        check_chips(chips)
        fixed = (self.batch_size, self.max_seq_len, self.cache_dtype)
        return Placement(
            chips,
            parameter_bytes_per_chip(self.config, self.scheme, chips),
            cache_bytes_per_chip(self.config, chips, *fixed),
            decode_bytes_per_chip(self.config, self.scheme, chips, *fixed),
        )

    def min_chips(self, generation: str) -> int:
        """The fewest chips with enough HBM together, as Table 2 counts: without padding, whether or not a slice has
        that many.
        """
        return min_chips(self.unsplit.held_bytes, CHIPS[generation].hbm_bytes)

    def min_padded_chips(self, generation: str) -> int | None:
        """The fewest chips that each have room for their padded part; None if it is not among the next few counts."""
        fewest, hbm = self.min_chips(generation), CHIPS[generation].hbm_bytes
        counts = range(fewest, min(2 * fewest, fewest + _COUNTS_TRIED, MAX_CHIPS) + 1)
        return next((chips for chips in counts if self.on(chips).held_bytes <= hbm), None)

    def smallest_slice(self, generation: str) -> Slice | None:
        """The smallest slice of a generation that holds it; None where none does."""
        fewest = self.min_chips(generation)
        candidates = (each for each in slices_of(generation) if each.devices >= fewest)
        return next((each for each in candidates if self.on(each.devices).fits(each)), None)

    def smallest_slices(self) -> list[Slice]:
        """The smallest slice of every generation that holds it, leaving out generations that have none."""
        found = (self.smallest_slice(generation) for generation in GENERATIONS)
        return [each for each in found if each is not None]

    def require_slice(self) -> None:
        """Raise InputError, saying what would be needed, where no slice holds it."""
        if self.smallest_slices():
            return
        needs = ", ".join(f"{self.min_chips(each)} {device_word(each)}s of {each}" for each in GENERATIONS)
        parameters, cache = format_bytes(self.unsplit.parameter_bytes), format_bytes(self.unsplit.cache_bytes)
        raise InputError(
            f"No slice holds {self.config.name} with batch size {self.batch_size} and {self.max_seq_len} tokens: "
            f"{parameters} of parameters and {cache} of cache need {needs} at least, and a chip holds one KV head's "
            f"{format_bytes(self.on(MAX_CHIPS).cache_bytes)} of cache or more. Give a smaller --batch-size or "
            "--max-seq-len, or a smaller model."
        )


@dataclass(frozen=True)
class Plan:
    """A workload, on a slice if one is given, else on a number of chips if that is known.

    ``compiled`` is the verdict of the TPU's own compiler, as JSON, if it was asked.
    """

    workload: Workload
    target: Slice | None = None
    chips: int | None = None
    compiled: Mapping[str, Any] | None = None

    @cached_property
    def placement(self) -> Placement | None:
        chips = self.target.devices if self.target else self.chips
        return None if chips is None else self.workload.on(chips)

    @property
    def generation(self) -> str:
        return self.target.generation if self.target else DEFAULT_GENERATION

    def to_json(self) -> dict[str, Any]:
        """The plan under the keys that scripts rely on. Bytes not under ``per_chip`` exclude padding."""
        whole, held, target = self.workload.unsplit, self.placement, self.target
        content = {
            "model": self.workload.config.name,
            "parameters": self.workload.parameters,
            "parameter_bytes": whole.parameter_bytes,
            "cache_bytes": whole.cache_bytes,
            "total_bytes": whole.held_bytes,
            "min_chips": self.workload.min_chips(self.generation),
            "target": target.name if target else None,
            "chips": held.chips if held else None,
            "fits": held.fits(target) if held and target else None,
            "per_chip": {
                "parameter_bytes": held.parameter_bytes,
                "cache_bytes": held.cache_bytes,
                "hbm_bytes": chip_of(target).hbm_bytes if target else None,
            }
            if held
            else None,
            "roofline_ms": held.roofline_ms(target) if held and target else None,
        }
        return content if self.compiled is None else content | {"compiled": dict(self.compiled)}
