"""Moments of linears' inputs against float64 hooks on transformers' models, from every kind of source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf_files
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from invoke import invoke
from meta_format import write_meta
from models import make_model, make_opt
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters.cli import command as convert
from converters.model.parameters import parameters
from converters.sources.opening import open_source
from converters.sources.source import TensorSource
from quantize.cli import command as quantize
from runtime.calibrate import blocks, calibrator

SIZES = {"heads": 4, "hidden": 48, "layers": 3, "ffn": 44, "vocab": 211}


def expected(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """By a weight's name, the mean square of its inputs: float64 [in], window by window."""
    sums: dict[str, torch.Tensor] = {}
    model = model.double().eval()

    def hook(name: str) -> Callable[..., None]:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).square().sum(0)

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        for window in windows:
            model(window[None], use_cache=False)
    return {name: total / windows.numel() for name, total in sums.items()}


def gathered(source: TensorSource, windows: torch.Tensor, scratch: Path) -> dict[str, torch.Tensor]:
    found = calibrator.gather_moments(source, source.config, windows, scratch, "key", lambda *_: None)
    calibrator.clear(scratch, "key", source.config)
    assert not list(scratch.glob("*"))
    return dict(found.by_weight)


def agree(source: TensorSource, model: PreTrainedModel, root: Path, shape: tuple[int, int] = (5, 23)) -> None:
    windows = torch.randint(source.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = gathered(source, windows, root / "scratch"), expected(model, windows)
    assert ours.keys() == theirs.keys()
    for name, moments in ours.items():
        assert moments.dtype == torch.float32
        torch.testing.assert_close(moments.double(), theirs[name], rtol=2e-5, atol=1e-12, msg=name)


def in_float64(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)


def filled(source: TensorSource, directory: Path) -> PreTrainedModel:
    """transformers' model of ``directory`` with a source's values."""
    model = in_float64(directory)
    values = {each.name: source.rows(each.name, 0, each.shape[0]).double() for each in parameters(source.config)}
    model.load_state_dict(values, strict=not source.config.tie_word_embeddings)
    return model


@pytest.mark.parametrize("case", ["plain", "gqa", "tied", "head-dim"])
def test_llama(case: str, tmp_path: Path) -> None:
    changes = {"plain": {}, "gqa": {"kv_heads": 2}, "tied": {"tied": True}, "head-dim": {"head_dim": 20}}[case]
    make_model(tmp_path / "hf", **SIZES, **changes)
    agree(open_source(tmp_path / "hf"), in_float64(tmp_path / "hf"), tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{}, {"do_layer_norm_before": False, "width": 32}, {"layer_norm_elementwise_affine": False}],
    ids=["pre-norm", "post-norm", "plain-norm"],
)
def test_opt(fields: dict[str, object], tmp_path: Path) -> None:
    """With biases, and as the 350M model: norms behind the sums, an embedding of another width."""
    make_opt(tmp_path / "hf", **SIZES, **fields)
    agree(open_source(tmp_path / "hf"), in_float64(tmp_path / "hf"), tmp_path)


def test_bfloat16(tmp_path: Path) -> None:
    """Weights of the checkpoint's dtype, all arithmetic in float32."""
    make_model(tmp_path / "hf", **SIZES, kv_heads=2, dtype=torch.bfloat16)
    agree(open_source(tmp_path / "hf"), in_float64(tmp_path / "hf"), tmp_path)


def test_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows and one window at a time change nothing."""
    make_model(tmp_path / "hf", **SIZES)
    monkeypatch.setattr(blocks.SourceWeight.blocks, "__defaults__", (100,))
    monkeypatch.setattr(calibrator, "_AT_ONCE", 1)
    agree(open_source(tmp_path / "hf"), in_float64(tmp_path / "hf"), tmp_path)


def test_seed(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", **SIZES, kv_heads=2)
    for storage in ("seed", "files"):
        arguments = ("--config", tmp_path / "hf" / "config.json", "--storage", storage, "--seed", 7)
        invoke(convert, *arguments, "--out", tmp_path / storage)
    agree(open_source(tmp_path / "seed"), in_float64(tmp_path / "files"), tmp_path)


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_gguf(kind: Type, tmp_path: Path) -> None:
    """Values are what transformers' model of the converted file has."""
    path = gguf_files.write(tmp_path / "model.gguf", gguf_files.random_tensors(kind))
    invoke(convert, "--source", path, "--dtype", "float32", "--out", tmp_path / "hf")
    agree(open_source(path), in_float64(tmp_path / "hf"), tmp_path)


def test_meta(tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", **SIZES | {"ffn": 128, "vocab": 212})  # by LLaMA's rule for 48
    write_meta(tmp_path / "meta", model, parts=2)
    source = open_source(tmp_path / "meta")
    model.config.rms_norm_eps = source.config.norm_eps
    agree(source, model, tmp_path)


def test_int8_checkpoint(tmp_path: Path) -> None:
    """compressed-tensors' int8, as llama-convert --keep-int8 writes it: what the integers stand for counts."""
    make_model(tmp_path / "hf", **SIZES, kv_heads=2)
    invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "shards")
    invoke(convert, "--source", tmp_path / "shards", "--keep-int8", "--out", tmp_path / "int8")
    source = open_source(tmp_path / "int8")
    agree(source, filled(source, tmp_path / "hf"), tmp_path)


def test_fewer_layers(tmp_path: Path) -> None:
    """A cut model's moments are those of the whole one's first layers."""
    model = make_model(tmp_path / "hf", **SIZES)
    source = open_source(tmp_path / "hf")
    windows = torch.arange(40).view(2, 20)
    cut = calibrator.gather_moments(source, source.config.cut(2), windows, tmp_path / "s", "", lambda *_: None)
    theirs = expected(model, windows)
    assert cut.by_weight.keys() == {name for name in theirs if "layers.2" not in name}
    assert all(torch.allclose(each.double(), theirs[name], rtol=2e-5) for name, each in cut.by_weight.items())


@pytest.mark.parametrize(
    ("count", "wanted", "shape", "after"),
    [
        (1200, 8192, (2, 512), 0),
        (1200, 1100, (2, 512), 0),
        (3000, 1100, (2, 512), 2),
        (700, 600, (1, 512), 0),
        (300, 8192, (1, 300), 0),
        (300, 100, (1, 100), 2),
        (1, 5, (1, 1), 0),
    ],
)
def test_windows(count: int, wanted: int, shape: tuple[int, int], after: int, tmp_path: Path) -> None:
    """The first tokens, cut into windows of 512; what is over is left out, and a short text is one window.

    So are those that come after them, up to a number.
    """
    make_model(tmp_path / "hf", **SIZES)
    ids = np.arange(count) % 211
    np.save(tmp_path / "ids.npy", ids)
    paths, most = [tmp_path / "ids.npy"], shape[1] * 2 + 1
    found, rest = calibrator.read_windows(open_source(tmp_path / "hf"), tmp_path / "hf", paths, wanted, most)
    assert found.shape == shape
    assert rest.shape == (after, shape[1])
    assert rest.flatten().tolist() == ids[wanted:][: rest.numel()].tolist()
    assert found.flatten().tolist() == ids[: found.numel()].tolist()


def test_windows_of_a_short_context(tmp_path: Path) -> None:
    """No window is longer than the model's positions; moments of all of a text in such windows."""
    make_opt(tmp_path / "hf", **SIZES, positions=100)
    np.save(tmp_path / "ids.npy", np.arange(1000) % 211)
    source = open_source(tmp_path / "hf")
    found, after = calibrator.read_windows(source, tmp_path / "hf", [tmp_path / "ids.npy"], 700, 150)
    assert found.shape == (10, 64)
    assert after.flatten().tolist() == [each % 211 for each in range(700, 828)]
    agree(source, in_float64(tmp_path / "hf"), tmp_path, tuple(found.shape))
