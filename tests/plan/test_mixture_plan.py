"""Plans of weights in several formats: sizes, what is shown, and what the TPU's compiler says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from invoke import SUPPORT, invoke, refuse
from mixtures import FORMATS, SIZES, shard
from models import make_model

from converters.model.families.presets import PRESETS
from quantize.shards.scheme import Scheme, mixture
from quantize.slices import find_slice
from runtime.model.sizing import decode_bytes_per_chip, parameter_bytes_per_chip
from runtime.plan.compiled_plan import compile_plan, dequantized_weights
from runtime.plan.hlo import parse_module
from runtime.plan.plan import Workload
from runtime.plan_cli import command as plan

# 1, 2 and 4 chips divide heads, and every axis into whole groups of 64.
EVEN = replace(
    PRESETS["7B"].with_dtype("bfloat16"),
    **{"num_layers": 3, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "vocab_size": 256},
    intermediate_size=1024,
)
# Bits of a weight with its part of what counts for a group, and bytes of what counts for an output.
COSTS = {
    "int4-g64": (4 + 16 / 64, 0),
    "int4-g32": (4 + 16 / 32, 0),
    "int4-g32-zp": (4 + (16 + 4) / 32, 0),
    "int4": (4, 4),
    "int8": (8, 4),
    "int8-g64": (8 + 16 / 64, 0),
    "fp8": (8, 4),
    "unquantized": (16, 0),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    make_model(root / "hf", **SIZES, dtype="bfloat16")
    for chips in (3, 4):
        shard(root / "hf", root / f"out{chips}", chips)
    return root


def expected_bytes(formats: dict[str, str], chips: int) -> int:
    """Of each chip, by hand."""
    d, ffn, vocab = EVEN.hidden_size, EVEN.intermediate_size, EVEN.vocab_size
    shapes = {"gate": (ffn, d), "up": (ffn, d), "down": (d, ffn), "lm_head": (vocab, d)}
    total = 2 * vocab * d / chips + 2 * d * (2 * EVEN.num_layers + 1)  # embedding, norms
    for name, form in formats.items():
        outputs, inputs = next((shape for part, shape in shapes.items() if part in name), (d, d))
        bits, per_output = COSTS[form]
        splits_inputs = "down_proj" in name or "o_proj" in name
        total += outputs * inputs / chips * bits / 8 + per_output * outputs / (1 if splits_inputs else chips)
    assert total == int(total)
    return int(total)


@pytest.mark.parametrize("chips", [1, 2, 4])
def test_sizes(chips: int) -> None:
    scheme = mixture(EVEN, FORMATS)
    held = expected_bytes(FORMATS, chips)
    assert parameter_bytes_per_chip(EVEN, scheme, chips) == held
    cache = 2 * 3 * 2 * 128 * 512 * 2 // chips
    one_row = 2 * (EVEN.vocab_size // chips * 512 - 2 * 512)  # of the embedding only the two tokens' rows are read
    assert decode_bytes_per_chip(EVEN, scheme, chips, 2, 128) == held - one_row + cache
    all_int8 = dict.fromkeys(FORMATS, "int8")
    assert parameter_bytes_per_chip(EVEN, Scheme("int8", True), chips) == expected_bytes(all_int8, chips)


def test_sizes_are_those_of_the_files(root: Path) -> None:
    """On chips that divide nothing, padding and repeated scales included; and the formats' shares."""
    for chips in (3, 4):
        path = next((root / f"out{chips}").glob("chip-00-*"))
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        found = json.loads(invoke(plan, "--shards", root / f"out{chips}", "--json", "-").stdout)
        assert found["per_chip"]["parameter_bytes"] == path.stat().st_size - header
    text = invoke(plan, "--shards", root / "out4").stdout
    assert "hf, 3 layers, mixed (int4-g64 32%, bf16 25%, int8 " in text
    fits = json.loads(invoke(plan, "--shards", root / "out4", "--target", "v5e-4", "--json", "-").stdout)
    assert fits["fits"] is True


def test_what_contradicts_the_shards_is_refused(root: Path) -> None:
    says = ["--int8 contradicts", "whose shards are of several formats"]
    refuse(root, plan, "--shards", root / "out4", "--int8", says=says)
    says = [f"Re-shard them: llama-quantize {root / 'out4'} --target v4-16 --out OTHER."]
    refuse(root, plan, "--shards", root / "out4", "--target", "v4-16", says=says)


# --- compiled

# An int8 weight; one in bfloat16 of the same sizes is fetched to the chip's own memory, and one of int8 is written out.
FETCHED = """HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (p0: s8[600,400], p1: bf16[600,400]) -> bf16[600,400] {
  %p0 = s8[600,400]{1,0} parameter(0)
  %p1 = bf16[600,400]{1,0} parameter(1)
  %copy-start = (bf16[600,400]{1,0:S(3)}, bf16[600,400]{1,0}, u32[]{:S(2)}) copy-start(%p1)
  %copy-done = bf16[600,400]{1,0:S(3)} copy-done(%copy-start)
  ROOT %fusion = bf16[600,400]{1,0} fusion(%p0), calls=%convert
}
"""


def test_fetching_a_weight_that_is_not_quantized_is_no_dequantization() -> None:
    assert dequantized_weights(parse_module(FETCHED)) == 1
    assert dequantized_weights(parse_module(FETCHED.replace("fusion(%p0)", "bitcast(%p1)"))) == 0


def test_the_tpu_s_compiler_takes_a_mixture(root: Path) -> None:
    """Whose layers and weights are all in different forms: no weight is written out dequantized."""
    wanted = ("--shards", root / "out4", "--target", "v5e-4", "--compile", "--json", "-")
    found = json.loads(invoke(plan, *wanted).stdout)
    compiled, held = found["compiled"], found["per_chip"]
    assert compiled["fits"]
    assert compiled["dequantized_weights"] == 0
    assert compiled["alias_bytes"] >= held["cache_bytes"]
    assert compiled["all_reduce"] + 2 * compiled["all_gather"] <= 2 * 3 + 5
    assert compiled["estimated_ms"] >= found["roofline_ms"]
    assert compiled["complete"]


@pytest.mark.slow
def test_arguments_are_as_large_as_the_files() -> None:
    """And a mixture's estimate lies between those of its formats."""

    def step(scheme: Scheme) -> tuple[int, int, float]:
        workload, target = Workload(config, scheme, 1, 256), find_slice("v4-8")
        compiled = compile_plan(workload, target).step
        assert compiled.dequantized_weights == 0
        return compiled.program.argument_bytes, workload.on(target.devices).held_bytes, compiled.estimated_ms

    config = PRESETS["7B"].with_dtype("bfloat16").cut(3)
    formats = {name: "int4-g64" if ".0." in name else "int8" for name in FORMATS if name != "lm_head.weight"}
    formats |= {name: "bf16" for name in formats if "layers.2" in name}
    times = []
    for scheme in (Scheme("int8"), mixture(config, formats), Scheme("bf16")):
        arguments, held, estimated_ms = step(scheme)
        assert arguments == pytest.approx(held, rel=0.01)
        times.append(estimated_ms)
    assert times == sorted(times)


@pytest.mark.slow
def test_same_graph_in_plan_and_run(root: Path, tmp_path: Path) -> None:
    """Layers that are unlike: what llama-plan compiles is what llama-run executes."""
    child = [sys.executable, SUPPORT / "child_graph.py", root / "out4", tmp_path / "result.json"]
    subprocess.run(child, check=True, timeout=300)
    graphs = json.loads((tmp_path / "result.json").read_text())
    assert len(graphs["run"]) == len(graphs["plan"]) == 3
    for pair in zip(graphs["run"], graphs["plan"], strict=True):
        run, planned = (graph | {"text": re.sub(r"module @\S+", "module @graph", graph["text"])} for graph in pair)
        assert run == planned
