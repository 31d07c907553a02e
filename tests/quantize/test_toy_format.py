"""A weight format of groups and packed values, added by its table alone, from a checkpoint to logits on three chips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from invoke import invoke
from models import make_model
from parity import decode, logits_after, relative
from safetensors import safe_open
from toy_format import GROUP, Toy
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters.cli import command as convert
from converters.console.errors import InputError
from quantize.format_options import AskedFormat
from quantize.formats.table import FORMATS, KINDS, Kind
from quantize.job import QuantizeRequest, quantize
from quantize.shards.reading import Shards
from quantize.shards.stored import Scheme, padding_bytes

CHIPS = 3  # which divide neither the 5 heads, nor the 7 groups of the feed-forward layer's inputs
SIZES = {"heads": 5, "kv_heads": 5, "hidden": 160, "head_dim": 32, "ffn": 224, "vocab": 517}
PROMPT = torch.randint(3, 517, (21,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, Toy.name, Toy())
    monkeypatch.setitem(KINDS, Toy.kind, Kind(Toy.kind, ""))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make_model(tmp_path / "hf", **SIZES)
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "checkpoint", "--dtype", "float32")
    return tmp_path / "checkpoint"


def shard(source: Path, out: Path, chips: int) -> Path:
    toy = AskedFormat(Toy.kind, str(GROUP))
    quantize(QuantizeRequest(source, out, toy, chips, (), None, False), force=False, dry_run=False)
    return out


def read(directory: Path) -> list[dict[str, np.ndarray]]:
    """Every chip's tensors, read by the format's own library."""
    found = []
    for path in sorted(directory.glob("chip-*.safetensors")):
        with safe_open(path, "np") as file:
            found.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def nbytes(directory: Path) -> int:
    """Of all tensors but the norms, which every chip holds whole."""
    return sum(values.nbytes for chip in read(directory) for name, values in chip.items() if "norm" not in name)


def expected(model: PreTrainedModel, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values [out, in] and scales [out, in / 32] of a weight, by float32 in numpy."""
    groups = model.state_dict()[name].numpy().reshape(-1, model.state_dict()[name].shape[1] // GROUP, GROUP)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(7)
    return np.round(groups / scale).reshape(len(groups), -1), scale[..., 0]


def unpacked(packed: np.ndarray) -> np.ndarray:
    """Values of int32 words, eight in each."""
    nibbles = [packed.view(np.uint32) >> shift & 15 for shift in range(0, 32, 4)]
    return np.stack(nibbles, axis=-1).reshape(len(packed), -1).astype(np.int16) - 8


def test_values_and_scales_lie_on_the_chips_that_use_them(checkpoint: Path, tmp_path: Path) -> None:
    """224 inputs of down on 3 chips: 80 on each, so that groups lie on two chips, and scales stand for 16 inputs."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    chips = read(shard(checkpoint, tmp_path / "three", CHIPS))
    name = "model.layers.0.mlp.down_proj.weight"
    values, scales = expected(model, name)
    assert [chip[name + "_packed"].shape for chip in chips] == [(160, 10)] * CHIPS
    assert [chip[name + "_scale"].shape for chip in chips] == [(160, 5)] * CHIPS
    for number, chip in enumerate(chips):
        for column in range(80):
            place = number * 80 + column
            found = unpacked(chip[name + "_packed"])[:, column]
            if place < 224:
                np.testing.assert_array_equal(found, values[:, place])
                np.testing.assert_allclose(chip[name + "_scale"][:, column // 16], scales[:, place // GROUP], rtol=1e-6)
            else:
                assert not found.any()


def test_shards_for_other_chips_are_those_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    three = shard(checkpoint, tmp_path / "three", CHIPS)
    again = read(shard(three, tmp_path / "again", 8))
    for ours, direct in zip(again, read(shard(checkpoint, tmp_path / "eight", 8)), strict=True):
        assert ours.keys() == direct.keys()
        for name, values in direct.items():
            np.testing.assert_array_equal(ours[name], values)
    padded = padding_bytes(Shards(three).config, Scheme(Toy.name), CHIPS)
    assert padded == nbytes(three) - nbytes(shard(three, tmp_path / "one", 1))


@pytest.mark.parametrize("backend", ["eager", "xla"])
def test_logits_are_those_of_the_decoded_weights(checkpoint: Path, tmp_path: Path, backend: str) -> None:
    shards = shard(checkpoint, tmp_path / "three", CHIPS)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    exact = logits_after(model, PROMPT)[-1]
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            values, scales = expected(model, name)
            tensor.copy_(torch.from_numpy(values * scales.repeat(GROUP, axis=1)))
    job = {"shards": shards, "dtype": "float32", "backend": backend, "max_seq_len": 64, "buckets": [32]}
    (result,) = decode([job | {"batches": [[PROMPT]], "new_tokens": 4}])
    assert result["recompilations"] == 0
    ours = result["logits"][0][0]
    assert relative(ours, logits_after(model, PROMPT)[-1]) < 1e-4
    assert relative(ours, exact) > 1e-2  # what 4 bits change would be seen


def test_inputs_that_are_no_multiple_of_a_group_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", **SIZES | {"ffn": 230})
    with pytest.raises(
        InputError, match=r"down_proj\.weight has 230 inputs, which is no multiple of 32. Give --group-size channel"
    ):
        shard(tmp_path / "hf", tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
