"""The TPU's own compiler on the decoder: memory against the files' arithmetic, collectives, what batch 1 costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from invoke import invoke

from converters.config import PRESETS
from quantize.scheme import Scheme
from quantize.targets import find_slice
from runtime.compiled_plan import CompiledGraph, compile_plan
from runtime.plan import Workload
from runtime.plan_cli import command as plan

pytestmark = pytest.mark.slow
LAYERS = 2


def compile_step(name: str, scheme: str, target: str, rows: int) -> tuple[CompiledGraph, Workload]:
    config = PRESETS[name].with_dtype("bfloat16").cut(LAYERS)
    workload = Workload(config, Scheme(scheme), rows, 256)
    return compile_plan(workload, find_slice(target)).step, workload


@pytest.mark.parametrize(("name", "scheme", "target"), [("7B", "int8", "v4-8"), ("7B", "bf16", "v4-8")])
def test_memory_is_that_of_the_files(name: str, scheme: str, target: str) -> None:
    step, workload = compile_step(name, scheme, target, 1)
    held = workload.on(find_slice(target).chips)
    assert step.program.argument_bytes == pytest.approx(held.held_bytes, rel=0.01)
    assert step.program.alias_bytes == held.cache_bytes
    assert step.program.temp_bytes < 0.2e9
    assert step.dequantized_weights == 0


def test_two_all_reduces_per_layer_and_batch_1_as_fast_as_2() -> None:
    alone, _ = compile_step("7B", "int8", "v4-8", 1)
    pair, _ = compile_step("7B", "int8", "v4-8", 2)
    for step in (alone, pair):
        assert step.collectives["all-reduce"][0] <= 2 * LAYERS + 3
        assert step.collectives.get("all-gather", (0, 0))[0] <= 2  # of the chips' best tokens, behind the layers
        assert step.estimate.complete
        assert step.estimated_ms >= 1000 * step.roofline_s
    assert alone.estimated_ms <= 1.15 * pair.estimated_ms


def test_the_command_reports_it(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 2048, "hidden_act": "silu"}
    config |= {"max_position_embeddings": 256, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = ("--config", tmp_path / "config.json", "--int8", "--target", "v5e-4", "--compile", "--buckets", "32")
    compiled = json.loads(invoke(plan, *wanted, "--json", "-").stdout)["compiled"]
    assert compiled["fits"]
    assert compiled["all_reduce"] + 2 * compiled["all_gather"] <= 2 + 5
    assert compiled["estimated_ms"] > 0
    assert compiled["buckets"]["32"]["alias_bytes"] == compiled["alias_bytes"] > 0
    text = invoke(plan, *wanted).stdout
    assert "no TPU was used" in text
    assert "bucket of 32 tokens: fits" in text
