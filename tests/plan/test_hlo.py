"""What XLA makes of the decode step: caches written in place, weights left alone, two all-reduces per layer."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke
from models import make_model, make_opt

from quantize.cli import command as quantize
from runtime.devices import pjrt
from runtime.run.session import open_session

LAYERS, CHIPS, SLOTS = 3, 4, 40
INSTRUCTION = re.compile(r"^  (?:ROOT )?%\S+ = (\(?[a-z0-9]+\[[^=]*?) ([a-z-]+)\(", re.MULTILINE)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The optimized HLO of the decode step of a LLaMA."""
    root = tmp_path_factory.mktemp("hlo")
    make_model(root / "hf", heads=8, kv_heads=4, hidden=64, head_dim=16, layers=LAYERS, ffn=96, vocab=224)
    return optimized_step(root)


@pytest.fixture(scope="module")
def bfloat16_step(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with activations and caches in bfloat16."""
    root = tmp_path_factory.mktemp("hlo-bfloat16")
    make_model(root / "hf", heads=8, kv_heads=4, hidden=64, head_dim=16, layers=LAYERS, ffn=96, vocab=224)
    return optimized_step(root, "bfloat16")


@pytest.fixture(scope="module")
def opt_step(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The optimized HLO of the decode step of an OPT."""
    root = tmp_path_factory.mktemp("hlo-opt")
    make_opt(root / "hf", heads=4, hidden=64, layers=LAYERS, ffn=96, vocab=224)
    return optimized_step(root)


def optimized_step(root: Path, dtype: str = "float32") -> str:
    """What XLA makes of the decode step of ``root``/hf, as the compiled program says."""
    invoke(quantize, root / "hf", "--int8", "--chips", CHIPS, "--out", root / "out")
    pjrt.start("cpu", 8)  # as other tests of this process
    programs, compile_ = [], pjrt.Mesh.compile

    def compile_and_note(*args: Any) -> pjrt.Program:
        programs.append(compile_(*args))
        return programs[-1]

    kinds = {"dtype": getattr(torch, dtype), "kv_cache_dtype": getattr(torch, dtype)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pjrt.Mesh, "compile", compile_and_note)
        with open_session(root / "out", **kinds, batch_size=1, max_seq_len=SLOTS, buckets=[16]) as session:
            session.warm_up()
    [text] = [each.text for each in programs if _outputs(each.text) == 2 * LAYERS + 2]  # tokens, slot, caches
    return text


def _outputs(text: str) -> int:
    """How many tensors a program gives, by the header of its text."""
    return text.split("\n", 1)[0].split(")->(")[1].split(")}")[0].count("[")


def _entry(text: str) -> Counter[tuple[str, str]]:
    """How often the program runs each kind of instruction, by its result."""
    return Counter(INSTRUCTION.findall(text[text.index("\nENTRY ") :]))


def test_every_cache_is_written_over_its_own_input(step: str) -> None:
    aliases = dict(re.findall(r"\{(\d+)\}: \((\d+), \{\}, may-alias\)", step.split("entry_computation_layout")[0]))
    assert sorted(map(int, aliases)) == list(range(2, 2 + 2 * LAYERS))
    assert len(set(aliases.values())) == 2 * LAYERS
    shapes = re.findall(r"[a-z0-9]+\[[0-9,]*\]", step.split("entry_computation_layout={(")[1].split(")->")[0])
    assert {shapes[int(place)] for place in aliases.values()} == {f"s32[1,1,{SLOTS},16]"}


@pytest.mark.parametrize(
    ("model", "dtype"), [("step", "s32"), pytest.param("bfloat16_step", "s16", marks=pytest.mark.slow)]
)
def test_a_cache_is_written_where_it_lies(model: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """One update each, no copy of the old one, and no second tensor of its dtype and size."""
    step = request.getfixturevalue(model)
    found = {
        kind: count for (shape, kind), count in _entry(step).items() if shape.startswith(f"{dtype}[1,1,{SLOTS},16]")
    }
    assert found == {"parameter": 2 * LAYERS, "fusion": 2 * LAYERS}
    fused = re.findall(rf"ROOT %\S+ = {dtype}\[1,1,{SLOTS},16\]\S* ([\w-]+)\(", step)
    assert fused == ["dynamic-update-slice"] * 2 * LAYERS


# By the chip: qkv, gate and up, o and down (split by inputs: their tiles lie chip by chip), and the output head.
WEIGHTS = {"s8": {(64, 64), (48, 64), (1, 64, 32), (1, 64, 24)}, "f32": {(56, 64)}}


def test_no_weight_is_transposed_copied_or_converted_in_memory(step: str) -> None:
    parameters = step.split("entry_computation_layout={(")[1].split(")->")[0]
    weights = {(dtype, sizes) for dtype, shapes in WEIGHTS.items() for sizes in shapes}
    assert all(f"{dtype}[{','.join(map(str, sizes))}]" in parameters for dtype, sizes in weights)
    made = [
        (kind, sorted(int(size) for size in sizes.split(",") if size not in ("", "1")))
        for (shape, kind), _ in _entry(step).items()
        for sizes in re.findall(r"\[([0-9,]*)\]", shape)
        if kind not in ("parameter", "tuple")
    ]
    matrices = [sorted(size for size in sizes if size > 1) for _, sizes in weights]
    assert not [(kind, sizes) for kind, sizes in made if sizes in matrices]


@pytest.mark.parametrize("model", ["step", pytest.param("opt_step", marks=pytest.mark.slow)])
def test_two_all_reduces_per_layer(model: str, request: pytest.FixtureRequest) -> None:
    """After attention and after the MLP, and one for the embedding; the head gathers its chips' best tokens.

    OPT's biases, norms and positions cost none: each chip has what it adds.
    """
    step = request.getfixturevalue(model)
    kinds = Counter()
    for (_, kind), count in _entry(step).items():
        kinds[kind] += count
    assert kinds["all-reduce"] == 2 * LAYERS + 1
    assert kinds["all-gather"] <= 2
    assert not kinds["all-to-all"] + kinds["collective-permute"] + kinds["reduce-scatter"]
