"""Shards back in bfloat16: the quantized values, dequantized and streamed into shards for the same chips.

They differ from the original weights by the quantization error, which doesn't matter for timing: speed does not
depend on values.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from converters.console.errors import InputError
from converters.console.progress import progress
from converters.console.units import format_bytes
from converters.output.claim import claim, is_complete
from converters.output.preflight import check_machine, free_bytes, room_for
from quantize.pipeline import Sharding, finished, write_shards
from quantize.report import FILE_NAME as REPORT
from quantize.report import Report
from quantize.shards.reading import Shards
from quantize.shards.scheme import Scheme
from quantize.shards.stored import StoredParameter
from quantize.values import Block, Resharder


def write_dequantized(shards: Shards, layers: int | None, out: Path, force: bool) -> bool:
    """Write bfloat16 shards of the first ``layers`` (None: all) into ``out``, for as many chips as ``shards`` are for.

    Resumes an interrupted run. Returns False if the shards were complete already. Raises InputError, with
    nothing removed, where a chip's file is missing, where they don't fit on the disk, or where ``out`` holds something
    else; with ``force`` shards of other arguments are replaced.
    """
    shards.require(range(shards.chips))
    config = shards.config.cut(layers).with_dtype("bfloat16")
    fingerprint = hashlib.sha256(f"dequantized {shards.manifest.source_fingerprint}".encode()).hexdigest()
    sharding = Sharding(config, Scheme("bf16"), shards.chips, tuple(range(shards.chips)), fingerprint)
    source = _Dequantizer(shards)

    def check_room(existing: int) -> None:
        _check_fits(sharding, out, existing)

    wanted = sharding.wanted(out, source)
    if is_complete(wanted, finished):
        return False
    with claim(wanted, finished, check_room, force) as output, progress("Dequantizing", sharding.nbytes) as advance:
        write_shards(sharding, source, output, advance)
    return True


def _check_fits(sharding: Sharding, out: Path, existing: int) -> None:
    """Raise InputError where the disk has no room for the files; ``existing`` bytes of them are on it already."""
    check_machine(out, sharding.chips, at_once=sharding.chips)
    room = free_bytes(out) + existing
    if room_for(sharding.nbytes) > room:
        raise InputError(
            f"{out} needs {format_bytes(sharding.nbytes)} for bfloat16 shards and has room for {format_bytes(room)}. "
            "Give --out on a larger disk."
        )


class _Dequantizer(Resharder):
    """Blocks of quantized shards, in the floating format that is wanted."""

    def block(self, stored: StoredParameter, start: int, stop: int) -> Block:
        values = self._shards.dequantized(stored.name, start, stop)
        return Block(stored.format.encode(values).tensors)

    def small_files(self) -> dict[str, bytes]:
        # An empty report: the quantized shards have the errors.
        return self._shards.auxiliary_files() | {REPORT: (json.dumps(Report().content(), indent=1) + "\n").encode()}
