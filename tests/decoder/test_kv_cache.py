"""The cache: written by index, in place or as new tensors, and in int8 with a scale per token and head."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import virtual_chips
from invoke import invoke, invoke_error
from models import make_model, write_hf
from parity import decode, reference, relative
from transformers import DynamicCache

from converters.cli import command as convert
from quantize.cli import command as quantize
from quantize.shards.reading import Shards
from runtime.cli import command as run
from runtime.devices.host import HostBackend
from runtime.model.decoder import Decoder
from runtime.model.kv_cache import FunctionalKVCache, KVCache, quantize_tokens
from runtime.model.sizing import cache_bytes_per_chip
from runtime.run.load import load_decoder, make_cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_both_caches_hold_what_was_written_last(dtype: torch.dtype) -> None:
    shape = (2, 3, 10, 8)
    tensors = [torch.zeros(shape, dtype=dtype) for _ in "kv"]
    if dtype == torch.int8:
        tensors += [torch.zeros(2, 3, 10, 1) for _ in "kv"]
    caches = [kind([[tensor.clone() for tensor in tensors]]) for kind in (KVCache, FunctionalKVCache)]
    expected = [torch.zeros(shape) for _ in "kv"]
    for slots in ([0, 1, 2], [2, 3], [9], [1]):
        parts = [torch.randn(2, 3, len(slots), 8) for _ in "kv"]
        for whole, part in zip(expected, parts, strict=True):
            whole[:, :, slots] = part
        before = [list(cache.layers[0]) for cache in caches]
        held = [tensor.clone() for tensor in before[1]]
        results = [cache.update(0, torch.tensor(slots), *parts) for cache in caches]
        assert all(new is old for new, old in zip(caches[0].layers[0], before[0], strict=True))  # in place
        assert all(torch.equal(old, kept) for old, kept in zip(before[1], held, strict=True))  # new tensors
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    keys, values, *scales = caches[0].layers[0]
    if dtype != torch.int8:
        assert torch.equal(keys, expected[0].to(dtype))
        assert torch.equal(values, expected[1].to(dtype))
        return
    for whole, found, scale in zip(expected, (keys, values), scales, strict=True):
        assert ((found * scale - whole).abs() <= scale / 2 * 1.001).all()


def test_a_token_is_quantized_by_its_own_size() -> None:
    x = torch.randn(4, 2, 6, 16) * torch.logspace(-6, 6, 6)[:, None]
    values, scale = quantize_tokens(x)
    assert values.abs().amax(-1).eq(127).all()
    assert torch.allclose(scale[..., 0].double(), x.double().abs().amax(-1) / 127, rtol=1e-6)
    zeros, _ = quantize_tokens(torch.zeros(1, 1, 1, 4))
    assert not zeros.any()


@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 0), ("float32", 0), ("int8", 4)])
def test_bytes_are_the_tensors_own(tmp_path: Path, dtype: str, scale: int) -> None:
    config = Shards(_shards(tmp_path)).config
    kind = getattr(torch, dtype)
    cache = make_cache(config, HostBackend("eager"), 3, 7, kind)
    found = sum(tensor.nbytes for layer in cache.layers for tensor in layer)
    assert found == 2 * config.num_layers * 3 * config.num_kv_heads * 7 * (config.head_dim * kind.itemsize + scale)
    assert found == cache_bytes_per_chip(config, 1, 3, 7, dtype)


def test_llama_run_reports_what_an_int8_cache_costs(tmp_path: Path) -> None:
    head_dim = Shards(shards := _shards(tmp_path)).config.head_dim
    fixed = ("--shards", shards, "--backend", "eager", "--prompt-ids", "3,4,5,6,7,8", "--dtype", "float32")
    fixed += ("--max-new-tokens", 4, "--json", "-")
    plain, small = (json.loads(invoke(run, *fixed, "--kv-cache-dtype", dtype).stdout) for dtype in ("auto", "int8"))
    assert plain["kv_cache_logit_error"] is None
    assert plain["memory"]["kv_cache_dtype"] == "float32"
    assert small["memory"]["kv_cache_dtype"] == "int8"
    error = small["kv_cache_logit_error"]
    assert 0 < error["relative"] < 0.05
    assert error["max_abs"] > 0
    sizes = [figures["memory"]["kv_cache_bytes_per_chip"] for figures in (plain, small)]
    assert sizes[0] * (head_dim + 4) == sizes[1] * 4 * head_dim
    assert small["bandwidth"]["step_bytes"] == plain["bandwidth"]["step_bytes"] - sizes[0] + sizes[1]


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "costs"),
    [("bfloat16", "float32", False), ("bfloat16", "bfloat16", False), ("float32", "bfloat16", True)],
)
def test_a_cache_that_rounds_no_more_than_the_activations_has_no_error(
    dtype: str, cache_dtype: str, costs: bool, tmp_path: Path
) -> None:
    fixed = ("--shards", _shards(tmp_path), "--backend", "eager", "--prompt-ids", "3,4,5,6,7,8", "--json", "-")
    found = json.loads(invoke(run, *fixed, "--dtype", dtype, "--kv-cache-dtype", cache_dtype).stdout)
    assert found["memory"]["kv_cache_dtype"] == cache_dtype
    assert (found["kv_cache_logit_error"] is not None) == costs
    if costs:
        assert 0 < found["kv_cache_logit_error"]["relative"] < 2**-8


class QuantizedCache(DynamicCache):
    """transformers' cache, but every token's keys and values of a head are rounded to 255 steps of their largest."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        steps = [tensor.abs().amax(-1, keepdim=True) / 127 for tensor in (keys, values)]
        rounded = [(each / step).round() * step for each, step in zip((keys, values), steps, strict=True)]
        return super().update(*rounded, *args, **kwargs)


@pytest.mark.parametrize(
    ("backend", "chips", "dtype"),
    [
        ("eager", 1, "float32"),
        ("eager", 1, "bfloat16"),
        pytest.param("inductor", 1, "bfloat16", marks=pytest.mark.slow),
        pytest.param("xla", 2, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_reported_error_is_the_cache_s_alone(backend: str, chips: int, dtype: str, tmp_path: Path) -> None:
    """As transformers computes it in float64, whatever the activations' dtype."""
    ids = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43]
    make_model(tmp_path / "hf", heads=4, kv_heads=2, hidden=64, head_dim=16)
    invoke(quantize, tmp_path / "hf", "--int8", "--chips", chips, "--out", tmp_path / "out")
    model = reference(tmp_path / "hf", tmp_path / "out", torch.float64)
    with torch.no_grad():
        exact, rounded = (
            model(torch.tensor([ids]), past_key_values=cache).logits[0, -1]
            for cache in (DynamicCache(config=model.config), QuantizedCache(config=model.config))
        )
    fixed = ("--shards", tmp_path / "out", "--backend", backend, "--dtype", dtype, "--kv-cache-dtype", "int8")
    bucket = 16 if backend == "inductor" else 8  # one section, or two, which would be two graphs more of Inductor's
    fixed += ("--prompt-ids", ",".join(map(str, ids)), "--max-seq-len", 16, "--buckets", bucket)
    if backend == "xla":
        virtual_chips.start()
    with virtual_chips.quickly_compiled():
        found = json.loads(invoke(run, *fixed, "--max-new-tokens", 2, "--json", "-").stdout)
    assert found["recompilations"] == 0
    error = found["kv_cache_logit_error"]
    assert error["relative"] == pytest.approx(((rounded - exact).norm() / exact.norm()).item(), rel=0.01)
    assert error["max_abs"] == pytest.approx((rounded - exact).abs().max().item(), rel=0.01)


def test_an_unknown_cache_dtype_is_refused(tmp_path: Path) -> None:
    assert "int8" in invoke_error(run, "--shards", _shards(tmp_path), "--kv-cache-dtype", "int4")


@pytest.mark.slow
@pytest.mark.parametrize("chips", [1, 4])
def test_int8_cache_on_chips(tmp_path: Path, chips: int) -> None:
    """Under XLA, its four tensors a layer split over the chips: as eager, for rows of different lengths."""
    make_model(tmp_path / "hf", heads=6, kv_heads=2, hidden=48, head_dim=16)
    results = []
    for backend, count in (("xla", chips), ("eager", 1)):
        out = tmp_path / f"out-{backend}"
        invoke(quantize, tmp_path / "hf", "--int8", "--chips", count, "--out", out)
        job = {
            "shards": out,
            "dtype": "float32",
            "kv_cache_dtype": "int8",
            "batches": [[[3, 4, 5, 6, 7, 8, 9], [10, 11, 12]]],
            "new_tokens": 12,
            "max_seq_len": 48,
            "buckets": [8],
            "backend": backend,
        }
        results += decode([job])
    assert results[0]["recompilations"] == 0
    assert relative(*(result["logits"][0] for result in results)) < 1e-3
    assert [row[:3] for row in results[0]["token_ids"][0]] == [row[:3] for row in results[1]["token_ids"][0]]


@pytest.mark.slow
def test_int8_cache_keeps_the_perplexity_of_a_real_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Within 1% of a bfloat16 cache on four stretches of 512 tokens of a novel."""
    invoke(convert, "--source", smollm2_gguf, "--out", tmp_path / "checkpoint")
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out")
    shards, backend = Shards(tmp_path / "out"), HostBackend("eager")
    ids = _novel_ids(tmp_path / "out" / "tokenizer.json")[: 4 * 512].view(4, 512)
    perplexities = {}
    with torch.no_grad():
        decoder, _ = load_decoder(shards, shards.config, torch.bfloat16, backend, lambda *done: None)
        for dtype in (torch.bfloat16, torch.int8):
            cache = make_cache(shards.config, backend, 4, 512, dtype)
            perplexities[dtype] = _perplexity(decoder, cache, ids)
    assert 30 < perplexities[torch.bfloat16] < 45  # transformers in float32: 37.6
    assert perplexities[torch.int8] == pytest.approx(perplexities[torch.bfloat16], rel=0.01)


def _perplexity(decoder: Decoder, cache: KVCache, ids: torch.Tensor) -> float:
    """Of every token but the first of each row [B, T], each attending through the cache to those before it."""
    x = decoder.fill(ids, torch.arange(ids.shape[1]), torch.zeros(len(ids), dtype=torch.long), cache)
    losses = []
    for row, tokens in zip(x, ids, strict=True):
        logits = decoder.head(row[:-1]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:]))
    return torch.stack(losses).mean().exp().item()


def _novel_ids(tokenizer: Path) -> torch.Tensor:
    """Botchan (in the public domain), from the sources of sentencepiece that the Makefile fetches."""
    from tokenizers import Tokenizer

    [archive] = (Path(sys.prefix) / "texts").glob("sentencepiece-*.tar.gz")
    with tarfile.open(archive) as files:
        [member] = [name for name in files.getnames() if name.endswith("/test/botchan.txt")]
        text = files.extractfile(member).read().decode("utf-8-sig").replace("\r\n", "\n")
    begin = text.index("\n", text.index("*** START")) if "*** START" in text else 0
    return torch.tensor(Tokenizer.from_file(str(tokenizer)).encode(text[begin:].strip()).ids)


def _shards(folder: Path) -> Path:
    invoke(quantize, write_hf(folder / "hf"), "--int8", "--out", folder / "out")
    return folder / "out"
