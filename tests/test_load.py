"""What a process of a multi-host slice reads: its own chips' files and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from invoke import invoke
from models import write_hf

from converters.errors import InputError
from quantize.cli import command as quantize
from quantize.shards import Shards
from runtime.xla import XLABackend


class OneHostOfTwo(XLABackend):
    """A backend whose slice has four chips, two of them on this host; parts are kept in place of being placed."""

    chips = 4
    local_chips = (2, 3)

    def __init__(self) -> None:
        """No device is brought up."""

    def _place(self, parts: list[torch.Tensor], axis: int | None) -> torch.Tensor:
        return parts[0] if axis is None else torch.cat(list(parts), dim=axis)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    invoke(quantize, write_hf(tmp_path / "hf"), "--int8", "--chips", 4, "--out", tmp_path / "out")
    return tmp_path / "out"


def test_a_host_needs_only_its_own_files(shards: Path) -> None:
    whole = Shards(shards)
    expected = {tensor.name: [whole.local(tensor.name, chip) for chip in (2, 3)] for tensor in whole.tensors.values()}
    for chip in (0, 1):
        (shards / f"chip-0{chip}-of-04.safetensors").unlink()
    half = Shards(shards)
    for tensor in half.tensors.values():
        found = OneHostOfTwo().load(half, tensor)
        axis = tensor.parameter.row.shard
        parts = expected[tensor.name]
        assert torch.equal(found, parts[0] if axis is None else torch.cat(parts, dim=axis))


def test_a_missing_file_of_its_own_is_named(shards: Path) -> None:
    (shards / "chip-03-of-04.safetensors").unlink()
    half = Shards(shards)
    tensor = next(iter(half.tensors.values()))
    with pytest.raises(InputError, match=r"chip-03-of-04\.safetensors"):
        OneHostOfTwo().load(half, tensor)
