"""Sizes against closed formulas, the bytes of real files, transformers' cache, and the post's Table 2."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from invoke import invoke
from models import SMALL, write_hf
from safetensors import safe_open
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from converters.model.config import ModelConfig
from converters.model.families.hf_config import to_hf
from converters.model.families.llama import LLAMA
from converters.model.families.presets import PRESETS
from quantize.cli import command as quantize
from quantize.shards.stored import Scheme
from runtime.model.sizing import (
    POST_HBM_BYTES,
    cache_bytes_per_chip,
    decode_bytes_per_chip,
    min_chips,
    parameter_bytes_per_chip,
    parameter_count,
    post_cache_bytes,
    post_parameter_bytes,
    post_parameters,
)

# Nothing of it divides by anything: 9 heads under 3 KV heads, tied embeddings.
ODD = ModelConfig(
    "odd", 72, 172, 2, 9, 3, 20, vocab_size=515, tie_word_embeddings=True, architecture=LLAMA.architecture
)
# Of the checkpoints that Meta published (arXiv 2302.13971), as transformers counts them.
PUBLISHED = {"7B": 6_738_415_616, "13B": 13_015_864_320, "33B": 32_528_943_616, "65B": 65_285_660_672}
# The post's Table 2: MB of parameters, MB of cache, GB in total, TPU v4 chips.
TABLE_2 = {
    "7B": (14_000, 134, 14.128, 1),
    "33B": (66_000, 408, 66.41, 3),
    "65B": (130_000, 671, 130.67, 5),
    "175B": (350_000, 1_208, 351.21, 11),
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameters_are_the_published_ones(name: str, count: int) -> None:
    assert parameter_count(PRESETS[name]) == count


@pytest.mark.parametrize("config", [SMALL, ODD, PRESETS["tiny"]], ids=lambda config: config.name)
def test_parameters_are_those_of_transformers(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**to_hf(config)))
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


OPTS = [name for name in PRESETS if name.startswith("opt-")]


@pytest.mark.parametrize("chips", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in OPTS])
def test_bytes_per_chip_are_the_closed_formula(name: str, chips: int) -> None:
    """Where the chips divide heads, FFN and vocabulary: matrices split, norms and row-parallel scales whole."""
    config = PRESETS[name]
    d, f, layers, v = config.hidden_size, config.intermediate_size, config.num_layers, config.vocab_size
    kv = config.num_kv_heads * config.head_dim
    matrices, norms, ends = 2 * d * d + 2 * d * kv + 3 * d * f, 2 * d, 2 * v * d
    bf16 = layers * (2 * matrices // chips + 2 * norms) + 2 * ends // chips + 2 * d
    assert parameter_bytes_per_chip(config, Scheme("bf16"), chips) == bf16
    split_scales, whole_scales = d + 2 * kv + 2 * f, 2 * d  # of q, k, v, gate, up; of o and down
    int8 = layers * (matrices // chips + 2 * norms + 4 * (split_scales // chips + whole_scales))
    assert parameter_bytes_per_chip(config, Scheme("int8"), chips) == int8 + 2 * ends // chips + 2 * d
    assert parameter_bytes_per_chip(config, Scheme("int8", quantize_lm_head=True), chips) == (
        int8 + 3 * v * d // chips + 4 * v // chips + 2 * d
    )


@pytest.mark.parametrize("chips", [1, 2, 4])
@pytest.mark.parametrize("name", OPTS)
def test_bytes_per_chip_of_opt_are_the_closed_formula(name: str, chips: int) -> None:
    """Biases of q, k, v and fc1 are split; those of out_proj and fc2, norms, positions and projections are whole."""
    config = PRESETS[name]
    d, f, layers, v, w = config.hidden_size, config.intermediate_size, config.num_layers, 50272, config.word_size
    matrices, split, whole = 4 * d * d + 2 * d * f, 3 * d + f, 2 * d  # whole: row-parallel biases, or their scales
    norms = 4 * d
    around = 2 * v * w // chips + 2 * (2050 * d + (2 * d * w if w != d else 2 * d))
    biases = 2 * (split // chips + whole)
    bf16 = layers * (2 * matrices // chips + biases + 2 * norms) + around
    assert parameter_bytes_per_chip(config, Scheme("bf16"), chips) == bf16
    int8 = layers * (matrices // chips + biases + 2 * norms + 4 * (split // chips + whole)) + around
    assert parameter_bytes_per_chip(config, Scheme("int8"), chips) == int8
    # A decode step reads 3 rows' positions, not 2050; and the embedding, which is the head as well, whole.
    cache = cache_bytes_per_chip(config, chips, 3, 256)
    assert decode_bytes_per_chip(config, Scheme("int8"), chips, 3, 256) == int8 - 2 * 2047 * d + cache


@pytest.mark.parametrize("flag", ["--int8", "--bf16"])
@pytest.mark.parametrize("config", [SMALL, ODD, replace(ODD, dtype="float32")], ids=lambda c: f"{c.name}-{c.dtype}")
def test_bytes_are_those_on_disk(config: ModelConfig, flag: str, tmp_path: Path) -> None:
    """Of every chip's file, read by the safetensors library, for chips that divide the model and that don't."""
    write_hf(tmp_path / "hf", config=config)
    for chips in (1, 3, 4, 8):
        out = tmp_path / f"out{chips}"
        invoke(quantize, tmp_path / "hf", flag, "--chips", chips, "--out", out)
        expected = parameter_bytes_per_chip(config, Scheme(flag[2:]), chips)
        files = sorted(out.glob("chip-*.safetensors"))
        assert len(files) == chips
        for path in files:
            with safe_open(path, "pt") as file:
                assert sum(file.get_tensor(name).nbytes for name in file.keys()) == expected  # noqa: SIM118
            header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            assert path.stat().st_size - header == expected


@pytest.mark.parametrize("config", [SMALL, ODD], ids=lambda config: config.name)
def test_cache_is_as_large_as_that_of_transformers(config: ModelConfig) -> None:
    model = LlamaForCausalLM(LlamaConfig(**to_hf(config))).bfloat16()
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.zeros(3, 7, dtype=torch.long), past_key_values=cache)
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes_per_chip(config, 1, 3, 7) == found


def test_cache_of_padded_heads() -> None:
    """33B on 8 chips: 56 places for 52 heads, 7 a chip; KV heads that are fewer than the chips are repeated."""
    assert cache_bytes_per_chip(PRESETS["33B"], 8, 2, 256) == 2 * 60 * 2 * 7 * 256 * 128 * 2
    shared = replace(PRESETS["65B"], num_kv_heads=8)
    assert cache_bytes_per_chip(shared, 16, 1, 256) == cache_bytes_per_chip(shared, 8, 1, 256)


@pytest.mark.parametrize("scheme", ["int8", "bf16"])
def test_a_decode_step_reads_all_but_the_embedding(scheme: str) -> None:
    """Of which it reads a row per token, unless it is the output head too."""
    for config, chips, batch in ((PRESETS["7B"], 4, 1), (PRESETS["7B"], 8, 16), (SMALL, 2, 3)):
        held = parameter_bytes_per_chip(config, Scheme(scheme), chips)
        cache = cache_bytes_per_chip(config, chips, batch, 64)
        table, rows = config.vocab_size // chips, batch
        expected = held + cache - 2 * config.hidden_size * (table - rows)
        assert decode_bytes_per_chip(config, Scheme(scheme), chips, batch, 64) == expected
        tied = replace(config, tie_word_embeddings=True)
        held = parameter_bytes_per_chip(tied, Scheme(scheme), chips)
        assert decode_bytes_per_chip(tied, Scheme(scheme), chips, batch, 64) == held + cache


# --- the post's formulas and its Table 2


@pytest.mark.parametrize("name", TABLE_2)
def test_formulas_are_the_posts(name: str) -> None:
    dim, layers = {"7B": (4096, 32), "33B": (6656, 60), "65B": (8192, 80), "175B": (12288, 96)}[name]
    config = PRESETS[name]
    assert post_parameters(config) == dim**2 * layers * 12
    assert post_parameter_bytes(config) == 2 * dim**2 * layers * 12
    cache_size = 4 * 512 * dim  # max_batch_size * max_seq_len * dimensions
    assert post_cache_bytes(config, 4, 512) == layers * 2 * cache_size * 2
    # "can be used to approximate the model size": it leaves out the vocabulary, so that small models are furthest off
    assert 0.95 < post_parameters(config) / parameter_count(config) < 1


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2(name: str) -> None:
    """The post rounds the parameters to the model's name, and cuts the cache off at whole MB."""
    parameters_mb, cache_mb, total_gb, chips = TABLE_2[name]
    config = PRESETS[name]
    parameters = parameter_bytes_per_chip(config, Scheme("bf16"), 1)
    cache = cache_bytes_per_chip(config, 1, 1, 256)
    assert parameters_mb == 2000 * int(name[:-1])
    assert parameters / 1e6 == pytest.approx(parameters_mb, rel=0.04)
    assert cache == post_cache_bytes(config, 1, 256)
    # 408.9 and 1207.96 MB are 408 and 1,208 there
    assert cache_mb in (math.floor(cache / 1e6), round(cache / 1e6))
    # 7B's total adds 128 (MiB) of cache, not the 134 (MB) beside it
    total_mb = parameters_mb + (128 if name == "7B" else cache_mb)
    assert total_gb == pytest.approx(total_mb / 1000, abs=0.006)
    assert min_chips(parameters + cache, POST_HBM_BYTES) == chips
    assert min_chips(post_parameter_bytes(config) + cache, POST_HBM_BYTES) == chips


def test_eleven_chips_for_175b_take_no_account_of_heads() -> None:
    """96 heads on 11 chips take 99 places, and with those each chip would hold more than its 32 GB; 12 do."""
    config, scheme = PRESETS["175B"], Scheme("bf16")

    def held(chips: int) -> int:
        return parameter_bytes_per_chip(config, scheme, chips) + cache_bytes_per_chip(config, chips, 1, 256)

    assert held(1) <= 11 * POST_HBM_BYTES
    assert held(11) > POST_HBM_BYTES >= held(12)


def test_int8_runs_175b_on_half_the_chips() -> None:
    """The post: 351 GB need a v4-32 (16 chips), int8 halves that and runs on a v4-16 (8 chips)."""
    config = PRESETS["175B"]
    bf16, int8 = (parameter_bytes_per_chip(config, Scheme(name), 8) for name in ("bf16", "int8"))
    cache = cache_bytes_per_chip(config, 8, 1, 256)
    assert int8 + cache < POST_HBM_BYTES < bf16 + cache
    assert int8 / bf16 == pytest.approx(0.5, abs=0.01)


def test_chips_are_rounded_up() -> None:
    assert [min_chips(total, 10) for total in (1, 10, 11, 20, 21)] == [1, 1, 2, 2, 3]
