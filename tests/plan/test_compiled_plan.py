"""The TPU's own compiler on the decoder: memory against the files' arithmetic, collectives, what batch 1 costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from invoke import SUPPORT, invoke

from converters.model.families.presets import PRESETS
from quantize.shards.stored import Scheme
from quantize.slices import find_slice
from runtime.plan.compiled_plan import CompiledGraph, compile_plan
from runtime.plan.latency import PUBLISHED
from runtime.plan.plan import Workload
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
    held = workload.on(find_slice(target).devices)
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
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 2048, "hidden_act": "silu"}
    config |= {"max_position_embeddings": 256, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = ("--config", tmp_path / "config.json", "--int8", "--target", "v5e-4", "--compile", "--buckets", "32")
    compiled = json.loads(invoke(plan, *wanted, "--json", "-").stdout)["compiled"]
    assert compiled["fits"]
    assert compiled["all_reduce"] + 2 * compiled["all_gather"] <= 2 * 2 + 5
    assert compiled["estimated_ms"] > 0
    assert compiled["buckets"]["32"]["alias_bytes"] == compiled["alias_bytes"] > 0
    first, later = compiled["buckets"]["32"], compiled["later_section"]
    assert later["estimated_ms"] > first["estimated_ms"]
    prediction = compiled["prediction"]
    assert prediction["ms"] == pytest.approx(compiled["estimated_ms"] + prediction["collectives_ms"])
    assert prediction["collectives_ms"] > 0
    assert 0 < prediction["leave_one_out_mean_error"] < prediction["leave_one_out_worst_error"]
    text = invoke(plan, *wanted).stdout
    assert "no TPU was used" in text
    assert "Prediction: " in text
    assert "not of this generation" in text
    assert "bucket of 32 tokens: fits" in text
    assert "later sections of longer prompts, 32 tokens: fits" in text


@pytest.mark.parametrize("target", ["v5e-1", "v6e-1"])
def test_a_program_that_no_chip_holds_has_every_key(target: str) -> None:
    """As where it fits, null where nothing is known; v6e has no estimate in either case."""
    wanted = ("--config", "tiny", "--int8", "--target", target, "--compile", "--json", "-")
    sizes = ((), ("--batch-size", 2048, "--max-seq-len", 8192))
    fits, refused = (json.loads(invoke(plan, *wanted, *each).stdout) for each in sizes)
    assert (fits["compiled"]["fits"], refused["compiled"]["fits"]) == (True, False)
    assert fits.keys() == refused.keys()
    assert fits["compiled"].keys() == refused["compiled"].keys()
    known = {key: value for key, value in refused["compiled"].items() if value is not None}
    assert known.keys() == {"fits", "out_of_memory"}
    assert "Ran out of memory" in known["out_of_memory"]
    assert fits["compiled"]["out_of_memory"] is None
    no_estimate = {"estimated_ms", "by_kind_ms", "unpriced_instructions", "complete"} if target == "v6e-1" else set()
    assert {key for key, value in fits["compiled"].items() if value is None} == {"out_of_memory"} | no_estimate


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the figures are of a later libtpu than Python 3.10's")
def test_what_the_prediction_is_fitted_on_is_what_the_compiler_says() -> None:
    """The figures kept in latency.py against two graphs of full depth, compiled now."""
    for point in PUBLISHED[:2]:
        workload = Workload(PRESETS[point.model].with_dtype("bfloat16"), Scheme("bf16"), 1, 256)
        step = compile_plan(workload, find_slice(point.target)).step
        assert step.estimated_ms == pytest.approx(point.estimated_ms, abs=0.0006)  # as rounded
        assert step.collective_count == point.collectives


def test_a_second_row_brings_batch_1_to_the_matrix_unit() -> None:
    config = PRESETS["7B"].with_dtype("bfloat16").cut(LAYERS)
    workload, slice_ = Workload(config, Scheme("bf16"), 1, 256), find_slice("v4-8")
    one, two = (compile_plan(workload, slice_, least_rows=rows).step.estimated_ms for rows in (1, 2))
    assert two < 0.6 * one


@pytest.mark.parametrize(
    ("scheme", "target", "fits"), [("int8", "v4-16", True), ("bf16", "v4-16", False), ("bf16", "v4-32", True)]
)
def test_175b_at_full_depth(scheme: str, target: str, fits: bool, tmp_path: Path) -> None:
    """All 96 layers in 8 GB of memory; held bytes as the files', caches in place, two all-reduces a layer."""
    program = [Path(sys.executable).with_name("llama-plan"), "--config", "175B", f"--{scheme}", "--target", target]
    child = [sys.executable, SUPPORT / "child_rusage.py", *program]
    done = subprocess.run(
        [*child, "--compile", "--json", tmp_path / "plan.json"], check=True, capture_output=True, text=True, timeout=900
    )
    assert int(done.stdout) < 8e9
    found = json.loads((tmp_path / "plan.json").read_text())
    compiled = found["compiled"]
    assert found["fits"] == compiled["fits"] == fits
    if not fits:
        assert "Ran out of memory" in compiled["out_of_memory"]
        assert compiled["prediction"] is None
        return
    held = found["per_chip"]["parameter_bytes"] + found["per_chip"]["cache_bytes"]
    assert compiled["argument_bytes"] == pytest.approx(held, rel=0.01)
    assert compiled["alias_bytes"] == found["per_chip"]["cache_bytes"]
    assert compiled["temp_bytes"] < 0.2e9
    assert compiled["all_reduce"] <= 2 * 96 + 3
    assert compiled["all_gather"] <= 2  # in the head
    assert compiled["dequantized_weights"] == 0
    assert compiled["complete"]
    assert found["roofline_ms"] <= compiled["estimated_ms"] < compiled["prediction"]["ms"]


def test_a_refusal_says_by_how_much_and_what_would_do() -> None:
    text = invoke(plan, "--config", "175B", "--bf16", "--target", "v4-16").stdout
    assert "Does not fit: 11.84 GB more than a chip has. The smallest slices that hold it: v4-32," in text
