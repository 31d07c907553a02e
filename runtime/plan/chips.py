"""The chips of each TPU generation, and how libtpu names a slice. Slice names and shapes are in quantize/slices.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converters.console.units import format_bytes
from quantize.slices import SLICES, Slice

GB = 10**9


@dataclass(frozen=True)
class Chip:
    """What one device of a chip has, which is all of the chip but for tpu7x, whose chips are two devices each.

    ``hbm_bytes`` of memory, read at ``hbm_bandwidth`` bytes per second; ``clock_hz`` turns cycles into time.

    Capacities are counted in GB of 10^9 bytes, as the post counts v4's, although the chips have the same number of GiB:
    a plan leaves the 7% between them to XLA. What the compiler grants a program lies between the two: its out-of-memory
    messages give 30.75 GiB (33.0 GB) for v4, 31.25 GiB (33.6 GB) for v6e and 94.74 GiB (101.7 GB) for tpu7x.
    """

    hbm_bytes: int
    hbm_bandwidth: int
    clock_hz: int | None


# Capacity and bandwidth: cloud.google.com/tpu/docs, "System architecture" of each generation's page.
CHIPS: dict[str, Chip] = {
    # 32 GiB, 1200 GBps. Clock: Jouppi et al. 2023, "TPU v4: An Optically Reconfigurable Supercomputer", table of
    # features.
    "v4": Chip(32 * GB, 1200 * GB, 1_050_000_000),
    # 95 GB, 2765 GBps. Clock: the one that gives 459 TFLOPs (same page) with 2 TensorCores of 4 MXUs of 128 x 128.
    "v5p": Chip(95 * GB, 2765 * GB, 1_750_000_000),
    # 16 GB, 819 GBps. Clock: "How to Scale Your Model" (jax-ml), chapter on TPUs.
    "v5e": Chip(16 * GB, 819 * GB, 1_500_000_000),
    # 32 GB, 1638 GBps. Clock: not published, nor derivable, since the pages disagree on the number of MXUs.
    "v6e": Chip(32 * GB, 1638 * GB, None),
    # Half of 192 GiB, 7380 GBps. Clock: not published, nor derivable: 2307 TFLOPs (same page) with the MXUs that jax's
    # table of chips counts (2 TensorCores of 2 of 256 x 256) would be 4.4 GHz.
    "tpu7x": Chip(96 * GB, 3690 * GB, None),
}


def chip_of(slice_: Slice) -> Chip:
    """The kind of chip in a slice, as one of its devices has it."""
    return CHIPS[slice_.generation]


def slices_of(generation: str) -> list[Slice]:
    """The slices of one generation, smallest first."""
    return [each for each in SLICES if each.generation == generation]


def describe(slice_: Slice) -> str:
    """A slice and its chips in one line."""
    chip = chip_of(slice_)
    return (
        f"{slice_.name}: {slice_.size}, interconnect {slice_.topology}, each "
        f"{format_bytes(chip.hbm_bytes)} of HBM at {format_bytes(chip.hbm_bandwidth)}/s"
    )


def libtpu_topology(slice_: Slice) -> tuple[str, dict[str, Any]]:
    """How libtpu's ahead-of-time compiler is given a slice: a name like ``v4:2x2x2``, and further options."""
    options: dict[str, Any] = {}
    if slice_.generation == "v4":
        # Chips of v4 and v5p have two cores; "megacore" makes them one device, as with torch_xla on a TPU. It is the
        # default for v5p. The two cores of tpu7x are always two devices.
        options["chip_config_name"] = "megacore"
    if slice_.chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]  # the default is 2x2 per host, more than the whole slice
    return f"{slice_.generation}:{slice_.topology}", options
