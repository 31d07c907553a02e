"""What a chip of each TPU generation has, and how libtpu names a slice. Names and shapes are in quantize/slices.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converters.console.units import format_bytes, plural
from quantize.slices import SLICES, Slice

GB = 10**9


@dataclass(frozen=True)
class Chip:
    """``hbm_bytes`` of memory, read at ``hbm_bandwidth`` bytes per second; ``clock_hz`` turns cycles into time.

    Capacities are counted in GB of 10^9 bytes, as the post counts those of v4, though the chips have as many GiB: the
    7% between them is what a plan leaves to XLA. The compiler grants a program less than the GiB and more than the GB:
    its out-of-memory messages give 30.75 GiB (33.0 GB) for v4 and 31.25 GiB (33.6 GB) for v6e.
    """

    hbm_bytes: int
    hbm_bandwidth: int
    clock_hz: int | None


# Capacity and bandwidth: cloud.google.com/tpu/docs, "System architecture" of each generation's page.
CHIPS: dict[str, Chip] = {
    # 32 GiB, 1200 GBps. Clock: Jouppi et al. 2023, "TPU v4: An Optically Reconfigurable Supercomputer", table of
    # features.
    "v4": Chip(32 * GB, 1200 * GB, 1_050_000_000),
    # 95 GB, 2765 GBps. Clock: that which makes 459 TFLOPs (same page) of 2 TensorCores of 4 MXUs of 128 x 128.
    "v5p": Chip(95 * GB, 2765 * GB, 1_750_000_000),
    # 16 GB, 819 GBps. Clock: "How to Scale Your Model" (jax-ml), chapter on TPUs.
    "v5e": Chip(16 * GB, 819 * GB, 1_500_000_000),
    # 32 GB, 1638 GBps. Clock: not published; the pages don't agree on the number of MXUs that it could be had from.
    "v6e": Chip(32 * GB, 1638 * GB, None),
}


def chip_of(slice_: Slice) -> Chip:
    """The chip that a slice is made of."""
    return CHIPS[slice_.generation]


def slices_of(generation: str) -> list[Slice]:
    """The slices of one generation, smallest first."""
    return [each for each in SLICES if each.generation == generation]


def describe(slice_: Slice) -> str:
    """A slice and its chips in one line."""
    chip = chip_of(slice_)
    return (
        f"{slice_.name}: {plural(slice_.chips, 'chip')}, interconnect {slice_.topology}, each "
        f"{format_bytes(chip.hbm_bytes)} of HBM at {format_bytes(chip.hbm_bandwidth)}/s"
    )


def libtpu_topology(slice_: Slice) -> tuple[str, dict[str, Any]]:
    """What libtpu's ahead-of-time compiler takes for a slice: its name, ``v4:2x2x2``, and the options beside it."""
    options: dict[str, Any] = {}
    if slice_.generation == "v4":
        # v4's and v5p's chips have two cores; "megacore" makes them one device, as torch_xla has it on a TPU. v5p's is
        # so by default.
        options["chip_config_name"] = "megacore"
    if slice_.chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]  # by default a host has 2x2, more than the whole slice
    return f"{slice_.generation}:{slice_.topology}", options
