"""llama-quantize end to end: shards against an independent quantization, chip counts against each other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from invoke import invoke, invoke_error
from models import make_model
from safetensors import safe_open
from safetensors.torch import load_file

from converters.cli import command as convert
from quantize.cli import command as quantize
from quantize.shards.reading import Shards

CHIP_COUNTS = (1, 2, 3, 4, 8, 16)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grouped-query model whose sizes divide by next to nothing, converted in bfloat16."""
    root = tmp_path_factory.mktemp("quantize")
    make_model(root / "hf", heads=6, kv_heads=2, hidden=48, head_dim=16, layers=2, ffn=172, vocab=515)
    invoke(convert, "--source", root / "hf", "--out", root / "checkpoint")
    return root / "checkpoint"


@pytest.fixture(scope="module")
def shards(checkpoint: Path) -> dict[int, Path]:
    """Shards for every chip count, each made straight from the checkpoint."""
    outs = {}
    for chips in CHIP_COUNTS:
        outs[chips] = checkpoint.parent / f"out{chips}"
        invoke(quantize, checkpoint, "--int8", "--chips", chips, "--out", outs[chips])
    return outs


def _digest(directory: Path) -> str:
    """Of every tensor put back together, values and scales."""
    shards = Shards(directory)
    digest = hashlib.sha256()
    for name, stored in shards.tensors.items():
        whole = shards.rows(name, 0, stored.shape[0])
        assert tuple(whole.shape) == stored.shape
        digest.update(name.encode())
        digest.update(whole.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _files(directory: Path) -> dict[str, str]:
    """By name, but for the record of the run, which knows its source."""
    files = (path for path in directory.iterdir() if path.name != ".written.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_one_chip_holds_the_quantized_checkpoint(checkpoint: Path, shards: dict[int, Path]) -> None:
    """Read by the library, against float64 arithmetic on the checkpoint's own files."""
    source = load_file(checkpoint / "model-00001-of-00001.safetensors")
    found = load_file(shards[1] / "chip-00-of-01.safetensors")
    for name, weight in source.items():
        stored = found.pop(name)
        if name.split(".")[-2] not in LINEARS:
            assert torch.equal(stored, weight)
            continue
        scale = found.pop(f"{name}_scale")
        assert (stored.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (len(weight), 1))
        exact = weight.double()
        torch.testing.assert_close(scale.double(), exact.abs().amax(1, keepdim=True) / 127, rtol=1e-6, atol=0)
        assert ((stored.double() - exact / scale.double()).abs() <= 0.5 + 1e-4).all()
    assert not found


def test_values_and_scales_do_not_depend_on_chips(shards: dict[int, Path]) -> None:
    assert len({_digest(directory) for directory in shards.values()}) == 1


@pytest.mark.parametrize("chips", CHIP_COUNTS)
def test_files_are_what_the_manifest_says(shards: dict[int, Path], chips: int) -> None:
    manifest = json.loads((shards[chips] / "shards.json").read_text())
    assert (manifest["format_version"], manifest["chips"], manifest["scheme"]) == (2, chips, "int8")
    assert len(manifest["files"]) == chips
    for name, record in manifest["files"].items():
        content = (shards[chips] / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        with safe_open(shards[chips] / name, "pt") as file:
            assert set(file.keys()) == set(manifest["tensors"])
            for tensor, entry in manifest["tensors"].items():
                local = file.get_tensor(tensor)
                assert str(local.dtype) == "torch." + entry["dtype"]
                whole = list(entry["shape"])
                if entry["shard_axis"] is not None:
                    padded = whole[entry["shard_axis"]] + entry["padding"]
                    assert padded % chips == 0
                    whole[entry["shard_axis"]] = padded // chips
                assert list(local.shape) == whole


def test_resharding_equals_quantizing_for_that_many_chips(shards: dict[int, Path], tmp_path: Path) -> None:
    invoke(quantize, shards[8], "--int8", "--chips", 3, "--out", tmp_path / "three")
    assert _files(tmp_path / "three") == _files(shards[3])
    invoke(quantize, tmp_path / "three", "--int8", "--chips", 16, "--out", tmp_path / "sixteen")
    assert _files(tmp_path / "sixteen") == _files(shards[16])


def test_seed_and_files_give_the_same_shards(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    make_model(tmp_path / "hf", heads=4, kv_heads=4, hidden=32, layers=2, ffn=172, vocab=99)
    config.write_text((tmp_path / "hf" / "config.json").read_text())
    for storage in ("files", "seed"):
        invoke(convert, "--config", config, "--storage", storage, "--out", tmp_path / storage, "--seed", 7)
        invoke(quantize, tmp_path / storage, "--int8", "--chips", 3, "--out", tmp_path / f"out-{storage}")
    files, seed = _files(tmp_path / "out-files"), _files(tmp_path / "out-seed")
    del files["shards.json"], seed["shards.json"]  # holds the source's fingerprint
    assert files == seed


def test_bf16_shards_hold_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    invoke(quantize, checkpoint, "--bf16", "--chips", 3, "--out", tmp_path / "out")
    source = load_file(checkpoint / "model-00001-of-00001.safetensors")
    shards = Shards(tmp_path / "out")
    assert set(shards.tensors) == set(source)
    for name, weight in source.items():
        assert torch.equal(shards.rows(name, 0, len(weight)), weight.bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_only_chip_writes_the_same_files(checkpoint: Path, shards: dict[int, Path], tmp_path: Path) -> None:
    invoke(quantize, checkpoint, "--int8", "--chips", 8, "--only-chip", 5, "--only-chip", 2, "--out", tmp_path / "out")
    ours, full = _files(tmp_path / "out"), _files(shards[8])
    assert [name for name in sorted(ours) if name.startswith("chip")] == [
        "chip-02-of-08.safetensors",
        "chip-05-of-08.safetensors",
    ]
    assert all(full[name] == digest for name, digest in ours.items() if name.startswith("chip"))
    line = invoke_error(quantize, tmp_path / "out", "--int8", "--chips", 4, "--out", tmp_path / "other")
    assert "chip-00-of-08.safetensors" in line


def test_layers_cut_the_model(checkpoint: Path, shards: dict[int, Path], tmp_path: Path) -> None:
    invoke(quantize, checkpoint, "--int8", "--layers", 1, "--out", tmp_path / "out")
    cut, whole = Shards(tmp_path / "out"), Shards(shards[1])
    assert cut.config.num_layers == 1
    assert set(cut.tensors) == {name for name in whole.tensors if not name.startswith("model.layers.1.")}
    for name, stored in cut.tensors.items():
        rows = stored.parameter.shape[0]
        assert torch.equal(cut.rows(name, 0, rows), whole.rows(name, 0, rows))


def test_quantized_lm_head(checkpoint: Path, tmp_path: Path) -> None:
    invoke(quantize, checkpoint, "--int8", "--quantize-lm-head", "--chips", 4, "--out", tmp_path / "out")
    shards = Shards(tmp_path / "out")
    assert shards.tensors["lm_head.weight"].part.dtype == "int8"
    assert shards.rows("lm_head.weight_scale", 0, 515).shape == (515, 1)


def test_report_is_the_error_of_each_tensor(checkpoint: Path, shards: dict[int, Path]) -> None:
    source = load_file(checkpoint / "model-00001-of-00001.safetensors")
    report = json.loads((shards[8] / "quantization_report.json").read_text())
    whole = Shards(shards[8])
    assert set(report["tensors"]) == {name for name in source if name.split(".")[-2] in LINEARS}
    for name, entry in report["tensors"].items():
        rows = len(source[name])
        found = whole.rows(name, 0, rows).double() * whole.rows(f"{name}_scale", 0, rows).double()
        difference = found - source[name].double()
        assert entry["relative_error"] == pytest.approx(
            (difference.norm() / source[name].double().norm()).item(), rel=1e-4
        )
        assert entry["max_error"] == pytest.approx(difference.abs().max().item(), rel=1e-4)
    worst = max(report["tensors"], key=lambda name: report["tensors"][name]["relative_error"])
    assert report["worst"] == worst


def test_verify_passes_and_dry_run_writes_nothing(checkpoint: Path, shards: dict[int, Path], tmp_path: Path) -> None:
    assert "16 files" in invoke(quantize, "--verify", "--out", shards[16]).stdout
    result = invoke(quantize, checkpoint, "--int8", "--chips", 4, "--out", tmp_path / "out", "--dry-run")
    assert "4 of 4 chips" in result.stdout
    assert not (tmp_path / "out").exists()


def test_padding_is_shown(checkpoint: Path, tmp_path: Path) -> None:
    result = invoke(quantize, checkpoint, "--int8", "--chips", 4, "--out", tmp_path / "out", "--dry-run")
    assert "6 query and 2 KV heads take 8 and 4 places" in result.stdout


def test_target_names_its_chips(checkpoint: Path, tmp_path: Path) -> None:
    result = invoke(quantize, checkpoint, "--int8", "--target", "v4-16", "--out", tmp_path / "out", "--dry-run")
    assert "8 of 8 chips" in result.stdout
    assert "v4-7" in invoke_error(quantize, checkpoint, "--int8", "--target", "v4-7", "--out", tmp_path / "out")


def test_target_whose_chips_are_two_devices_gets_a_file_for_each(checkpoint: Path, tmp_path: Path) -> None:
    """The same files as for 8 chips, and a note that says why there are 8 for 4 chips."""
    said = invoke(quantize, checkpoint, "--int8", "--target", "tpu7x-8", "--out", tmp_path / "out")
    assert said.stderr.splitlines() == [
        "Note: tpu7x-8 is 8 devices on 4 chips: every device gets a file of its own and is counted as a chip here."
    ]
    plain = invoke(quantize, checkpoint, "--int8", "--chips", 8, "--out", tmp_path / "plain")
    assert plain.stderr == ""
    names = sorted(path.name for path in (tmp_path / "out").glob("chip-*"))
    assert names == [f"chip-{chip:02}-of-08.safetensors" for chip in range(8)]
    for name in (*names, "shards.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_same_command_again_finds_it_complete(checkpoint: Path, shards: dict[int, Path]) -> None:
    before = _files(shards[4])
    result = invoke(quantize, checkpoint, "--int8", "--chips", 4, "--out", shards[4])
    assert "already complete" in result.stdout
    assert _files(shards[4]) == before
