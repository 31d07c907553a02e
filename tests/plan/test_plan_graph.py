"""llama-plan compiles the graphs that llama-run executes: the same program, split, donated caches, constants."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from invoke import SUPPORT, invoke
from models import make_model, make_opt

from quantize.cli import command as quantize

CHIPS = 4


@pytest.fixture(scope="module", params=["llama", pytest.param("opt", marks=pytest.mark.slow)])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        make_model(root / "hf", heads=8, kv_heads=4, hidden=64, head_dim=16, layers=2, ffn=96, vocab=224)
    else:
        make_opt(root / "hf", heads=6, hidden=48, layers=2, ffn=90, vocab=211, width=40, do_layer_norm_before=False)
    invoke(quantize, root / "hf", "--int8", "--chips", CHIPS, "--out", root / "out")
    child = SUPPORT / "child_graph.py"
    subprocess.run([sys.executable, child, root / "out", root / "result.json"], check=True, timeout=300)
    return json.loads((root / "result.json").read_text()) | {"model": request.param}


def test_same_graph_in_plan_and_run(graphs: dict) -> None:
    """A bucket, its later sections, the step, and no fourth: the step's second call finds the first one's program.

    Alike are programs, the split of inputs and results over the chips, donated inputs and constants.
    """
    assert len(graphs["run"]) == len(graphs["plan"]) == 3
    for run, plan in zip(graphs["run"], graphs["plan"], strict=True):
        assert _renamed(run) == _renamed(plan)


def _renamed(graph: dict) -> dict:
    """Without the module's name, which torch_xla numbers by the operations that it traced before."""
    return graph | {"text": re.sub(r"module @\S+", "module @graph", graph["text"])}


def test_caches_are_donated_and_split_by_heads(graphs: dict) -> None:
    """Keys and values of both layers; the results that replace them are split in the same way."""
    for graph in graphs["plan"]:
        donated = [graph["inputs"][index] for index in graph["donated"]]
        assert len(donated) == 4
        assert donated == graph["results"][-4:]
        assert {(each["axis"], each["dtype"]) for each in donated} == {(1, "torch.bfloat16")}


# qkv, o, gate and up (of OPT one alone), down, and the axis along which they are split. OPT's 6 heads of 8 take 8
# places, its 90 inner sizes 92.
WEIGHTS = {
    "llama": {(256, 64, 0), (64, 128, 1), (192, 64, 0), (64, 96, 1)},
    "opt": {(192, 48, 0), (48, 64, 1), (92, 48, 0), (48, 92, 1)},
}


def test_weights_come_as_the_shards_hold_them(graphs: dict) -> None:
    """The CPU's tiles, of which those split by inputs would lie chip by chip, are not in the graph for TPU."""
    for graph in [*graphs["plan"], *graphs["run"]]:
        weights = {(*each["shape"], each["axis"]) for each in graph["inputs"] if each["dtype"] == "torch.int8"}
        assert weights == WEIGHTS[graphs["model"]]
