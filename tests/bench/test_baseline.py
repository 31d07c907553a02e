"""The baseline of llama-bench is transformers' own model with the shards' own values; dequantized shards hold these."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from invoke import invoke
from models import SMALL, make_model, snapshot, write_hf
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from converters.console.errors import InputError
from converters.output import preflight
from quantize.cli import command as quantize
from quantize.dequantize import write_dequantized
from quantize.shards.reading import Shards
from runtime.bench.baseline import _generate, _HostCPU, load_model


def _exact(directory: Path) -> dict[str, torch.Tensor]:
    """Every parameter of int8 shards in float64, put together from a copy of them for one chip, without our reader."""
    invoke(quantize, directory, "--int8", "--out", directory.with_name("one"))
    tensors = load_file(directory.with_name("one") / "chip-00-of-01.safetensors")
    return {
        name: tensor.double() * tensors[f"{name}_scale"].double() if f"{name}_scale" in tensors else tensor.double()
        for name, tensor in tensors.items()
        if not name.endswith("_scale")
    }


@pytest.mark.parametrize("chips", [1, 3])
def test_dequantized_shards_hold_values_times_scales(tmp_path: Path, chips: int) -> None:
    write_hf(tmp_path / "hf")
    invoke(quantize, tmp_path / "hf", "--int8", "--chips", chips, "--out", tmp_path / "int8")
    exact = _exact(tmp_path / "int8")
    assert write_dequantized(Shards(tmp_path / "int8"), None, tmp_path / "bf16", force=False)
    shards = Shards(tmp_path / "bf16")
    shards.verify(lambda count, tensor="": None)
    assert (shards.chips, shards.manifest.scheme.name) == (chips, "bf16")
    assert shards.tensors.keys() == exact.keys()
    for name, values in exact.items():
        got = shards.rows(name, 0, len(values))
        assert got.dtype is torch.bfloat16
        torch.testing.assert_close(got, values.float().to(torch.bfloat16), rtol=2**-8, atol=0)
        assert (got.double() - values).abs().max() <= values.abs().max() * 2**-8
    assert not write_dequantized(
        Shards(tmp_path / "int8"), None, tmp_path / "bf16", force=False
    )  # nothing was left to do


def test_dequantized_shards_of_a_cut_model_run_as_such(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "int8")
    write_dequantized(Shards(tmp_path / "int8"), 1, tmp_path / "bf16", force=False)
    assert Shards(tmp_path / "bf16").config.num_layers == 1


def test_dequantized_shards_of_other_arguments_are_refused_or_forced(tmp_path: Path) -> None:
    """A full disk is found before the earlier ones are removed, whose room counts as free."""
    write_hf(tmp_path / "hf")
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "int8")
    shards, out = Shards(tmp_path / "int8"), tmp_path / "bf16"
    write_dequantized(shards, 1, out, force=False)
    before = snapshot(out)
    with pytest.raises(InputError, match="layers 1, now 2"):
        write_dequantized(shards, None, out, force=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(InputError, match="has room for"):
            write_dequantized(shards, None, out, force=True)
        assert not write_dequantized(shards, 1, out, force=True)  # nothing to write: the disk may be full
    assert snapshot(out) == before
    held = (out / "chip-00-of-01.safetensors").stat().st_size
    assert write_dequantized(shards, None, tmp_path / "whole", force=False)
    needed = (tmp_path / "whole" / "chip-00-of-01.safetensors").stat().st_size
    free = preflight.room_for(needed) - held
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        assert write_dequantized(shards, None, out, force=True)
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    invoke(quantize, tmp_path / "hf", "--int8", "--chips", 2, "--out", tmp_path / "int8")
    (tmp_path / "int8" / "chip-01-of-02.safetensors").unlink()
    with pytest.raises(InputError, match="chip-01-of-02"):
        write_dequantized(Shards(tmp_path / "int8"), None, tmp_path / "bf16", force=False)
    assert not (tmp_path / "bf16").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_what_from_pretrained_makes_of_the_same_values(tmp_path: Path, tied: bool) -> None:
    make_model(tmp_path / "hf", tied=tied, heads=4, kv_heads=2, theta=5000.0, eps=1e-3)
    invoke(quantize, tmp_path / "hf", "--int8", "--chips", 3, "--out", tmp_path / "int8")
    shards = Shards(tmp_path / "int8")
    tensors = {
        name: shards.dequantized(name, 0, tensor.parameter.shape[0])
        for name, tensor in shards.tensors.items()
        if not name.endswith("_scale")
    }
    write_hf(tmp_path / "dequantized", tensors, shards.config)
    with torch.no_grad():
        reference = LlamaForCausalLM.from_pretrained(tmp_path / "dequantized", dtype=torch.float32).eval()
        model = load_model(tmp_path / "int8", torch.float32, None)
        ids = torch.randint(shards.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
        assert torch.equal(model(ids).logits, reference(ids).logits)
        expected = reference.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)[:, 9:]
        assert _generate(model, ids, 6, _HostCPU()).token_ids == expected.tolist()
        assert len(load_model(tmp_path / "int8", torch.float32, 1).model.layers) == 1


def test_a_prompt_of_one_token_has_no_prefill(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "int8")
    with torch.no_grad():
        made = _generate(load_model(tmp_path / "int8", torch.bfloat16, None), torch.tensor([[3]]), 2, _HostCPU())
    assert [len(row) for row in made.token_ids] == [2]
    assert all(0 <= token < SMALL.vocab_size for token in made.token_ids[0])
