"""The model-parallel parts of one of Meta's checkpoints (consolidated.00.pth ...): checked for consistency, merged."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from converters.console.errors import InputError, MissingTensor
from converters.console.notes import note
from converters.console.units import plural
from converters.formats.tensor_files import PickleFile

if TYPE_CHECKING:
    import torch

_PART = re.compile(r"consolidated\.(\d{2})\.pth")
# The largest relative difference allowed between the parts' copies of a tensor. LLaMA 3 70B's norms differ in the last
# bits of bfloat16: each part trained its own copy. 1/16 is 8 units in bfloat16's last place, more than rounding and
# drift of copies that saw the same gradients; norms of different models differ by more somewhere.
_DRIFT = 1 / 16


def part_name(number: int) -> str:
    return f"consolidated.{number:02d}.pth"


def part_paths(directory: Path) -> list[Path]:
    """The files of a directory that have the name of a part, in order."""
    return sorted(path for path in directory.iterdir() if _PART.fullmatch(path.name))


def open_parts(directory: Path) -> list[PickleFile]:
    """The parts in order. Raises InputError, naming the part, where one is missing in between or can't be opened."""
    paths = part_paths(directory)
    for number, path in enumerate(paths or [directory]):
        if path.name != part_name(number):
            raise InputError(f"{directory} lacks {part_name(number)}; fetch it, all parts are needed.")
    return [PickleFile(path) for path in paths]


def check_count(parts: list[PickleFile], rows: int, total: int, name: str) -> None:
    """Raise InputError unless parts that each hold ``rows`` of ``name``'s ``total`` rows are complete."""
    directory = parts[0].path.parent
    if rows * len(parts) == total:
        return
    if not rows or total % rows:
        raise InputError(f"{parts[0].path} holds {rows} rows of {name}, which can't be a part of {total}.")
    count = total // rows
    if count < len(parts):
        raise InputError(
            f"{directory} holds {len(parts)} parts, and by their size the checkpoint has {count}; "
            f"{part_name(count)} and those after it belong to another checkpoint."
        )
    missing = ", ".join(part_name(number) for number in range(len(parts), min(count, len(parts) + 8)))
    raise InputError(f"{directory} lacks {missing}: by their size the others are parts of {count}.")


def check_same_names(parts: list[PickleFile], ignored: re.Pattern[str]) -> None:
    """Raise MissingTensor for a tensor that one part holds and another lacks, unless its name is ``ignored``."""
    first = parts[0]
    for part in parts[1:]:
        for one, other in ((first, part), (part, first)):
            for name in sorted(set(one.names()) - set(other.names())):
                if not ignored.fullmatch(name):
                    raise MissingTensor(f"{other.path} lacks the tensor {name[:80]!r}, which {one.path.name} holds.")


def check_shapes(parts: list[PickleFile], name: str, axis: int | None, whole: tuple[int, ...]) -> None:
    """Raise InputError for a part that doesn't hold its equal share, along ``axis``, of a tensor of shape ``whole``.

    Without an axis each part must hold all of it. All parts must hold it in the same dtype.
    """
    expected = [length // len(parts) if i == axis else length for i, length in enumerate(whole)]
    divides = axis is None or whole[axis] % len(parts) == 0
    dtype = parts[0].dtype(name)
    for part in parts:
        shape = list(part.shape(name))
        if shape != expected or not divides:
            raise InputError(
                f"{part.path} holds {name} in shape {shape}; {list(whole)} in {len(parts)} parts calls for "
                f"{expected} each."
            )
        if part.dtype(name) != dtype:
            raise InputError(
                f"{part.path} holds {name} as {part.dtype(name)}, {parts[0].path.name} as {dtype}; they are parts of "
                "different checkpoints."
            )


def check_replicas(parts: list[PickleFile], names: Iterable[str]) -> None:
    """Note tensors of which every part holds a copy, where the copies differ; the first part's is used.

    Raises InputError where a value differs by more than ``_DRIFT``.
    """
    largest, differing = 0.0, []
    for name in names:
        apart = max((_apart(parts[0], part, name) for part in parts[1:]), default=0.0)
        if apart:
            differing.append(name)
            largest = max(largest, apart)
    if differing:
        note(
            f"{parts[0].path.parent}: the parts differ in {plural(len(differing), 'tensor')} that each of them holds "
            f"(such as {differing[0]}), by up to {largest:.2g} of a value; those of {parts[0].path.name} are taken."
        )


def _apart(first: PickleFile, part: PickleFile, name: str) -> float:
    """The largest relative difference between two copies of a tensor.

    It is relative to the larger of both values and the tensor's root mean square. Raises InputError above ``_DRIFT``.
    """
    import torch

    ours, theirs = (each.rows(name, 0, each.shape(name)[0]) for each in (first, part))
    if torch.equal(ours, theirs):
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    unit = torch.maximum(torch.maximum(ours.abs(), theirs.abs()), ours.square().mean().sqrt())
    apart = ((ours - theirs).abs() / unit).max().item()
    if not apart <= _DRIFT:  # NaN neither
        raise InputError(
            f"{part.path} holds another {name} than {first.path.name}, though every part has it whole; they are parts "
            "of different checkpoints. Put parts of one checkpoint there."
        )
    return apart


def merged_rows(parts: list[PickleFile], name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor that the parts split evenly along ``axis``, or (None) of which each has a copy."""
    import torch

    if axis is None:
        return parts[0].rows(name, start, stop)
    if axis == 1:
        return torch.cat([part.rows(name, start, stop) for part in parts], dim=1)
    length = parts[0].shape(name)[0]
    pieces = []
    for number in range(start // length, -(-stop // length)):
        begin = number * length
        pieces.append(parts[number].rows(name, max(start - begin, 0), min(stop - begin, length)))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
