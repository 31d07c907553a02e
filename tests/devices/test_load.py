"""What a process of a multi-host slice reads: its own chips' files and no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from invoke import invoke
from models import write_hf

from converters.console.errors import InputError
from converters.model.families.presets import PRESETS
from quantize.cli import command as quantize
from quantize.shards.reading import Shards
from quantize.shards.stored import Scheme, stored_tensors
from runtime.devices.xla import XLABackend
from runtime.model.decoder_tensors import decoder_parameters, decoder_tensors


class OneHostOfTwo(XLABackend):
    """A backend whose slice has four chips, two of them on this host; parts are kept in place of being placed."""

    chips = 4

    def __init__(self) -> None:
        """No device is brought up."""
        self._mesh = SimpleNamespace(local_chips=(2, 3))

    def _hold(self, parts: Sequence[torch.Tensor], axis: int | None, label: str) -> torch.Tensor:
        return parts[0] if axis is None else torch.cat(list(parts), dim=axis)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    invoke(quantize, write_hf(tmp_path / "hf"), "--int8", "--chips", 4, "--out", tmp_path / "out")
    return tmp_path / "out"


def test_a_host_needs_only_its_own_files(shards: Path) -> None:
    """Each tensor of the decoder is what its chips' files hold, those put together one upon the other."""
    whole = Shards(shards)
    expected = {name: [whole.local(name, chip) for chip in (2, 3)] for name in whole.tensors}
    for chip in (0, 1):
        (shards / f"chip-0{chip}-of-04.safetensors").unlink()
    half = Shards(shards)
    held = decoder_tensors(decoder_parameters(half.config, half.manifest.scheme, 4, None))
    assert sorted(part.name for tensor in held for part in tensor.parts) == sorted(whole.tensors)
    assert max(len(tensor.parts) for tensor in held) == 3
    for tensor in held:
        found = OneHostOfTwo().load(half, tensor)
        parts = [torch.cat([expected[part.name][host] for part in tensor.parts]) for host in (0, 1)]
        joined = parts[0] if tensor.shard is None else torch.cat(parts, dim=tensor.shard)
        assert torch.equal(found, joined.flatten() if tensor.name.endswith("_scale") else joined)


@pytest.mark.parametrize(
    ("limit", "fused"), [(None, {"qkv_proj", "gate_up_proj"}), (10_000, {"gate_up_proj"}), (0, set())]
)
def test_weights_are_put_together_up_to_a_size(limit: int | None, fused: set[str]) -> None:
    """int8 weights of the tiny model on 64 chips: 3 heads of 32 rows, and 2 * 12 rows, of 256 each."""
    config = PRESETS["tiny"]
    held = decoder_tensors(decoder_parameters(config, Scheme("int8"), 64, limit))
    names = {tensor.name.split(".")[-2] for tensor in held if len(tensor.parts) > 1}
    assert names == fused
    parts = [part.name for tensor in held for part in tensor.parts]
    assert sorted(parts) == sorted(tensor.name for tensor in stored_tensors(config, Scheme("int8")))


@pytest.mark.parametrize(("limit", "fused"), [(None, 6), (0, 0)])
def test_biases_go_with_their_weights(limit: int | None, fused: int) -> None:
    """OPT's q, k and v: weight, scale and bias each, in two layers."""
    config = PRESETS["opt-125m"].cut(2)
    held = decoder_tensors(decoder_parameters(config, Scheme("int8"), 5, limit))
    together = {tensor.name: tensor for tensor in held if len(tensor.parts) == 3}
    assert len(together) == fused
    for name, tensor in together.items():
        kind = name.rpartition("qkv_proj.")[2]
        assert [part.name.rpartition("self_attn.")[2] for part in tensor.parts] == [f"{p}_proj.{kind}" for p in "qkv"]
    parts = [part.name for tensor in held for part in tensor.parts]
    assert sorted(parts) == sorted(tensor.name for tensor in stored_tensors(config, Scheme("int8")))


def test_a_missing_file_of_its_own_is_named(shards: Path) -> None:
    (shards / "chip-03-of-04.safetensors").unlink()
    half = Shards(shards)
    tensor = decoder_tensors(decoder_parameters(half.config, half.manifest.scheme, 4, None))[0]
    with pytest.raises(InputError, match=r"chip-03-of-04\.safetensors"):
        OneHostOfTwo().load(half, tensor)
