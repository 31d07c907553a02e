"""llama-plan compiles the graphs that llama-run executes: the same text, the same split, the same donated caches."""

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


def _without_shardings(text: str) -> str:
    """The text with names numbered as they come: an annotation gives an instruction another number."""
    names: dict[str, str] = {}
    text = re.sub(r", sharding=\{.*?\}(?=,|$|\n)", "", text)
    return re.sub(r"[\w-]+\.\d+", lambda name: names.setdefault(name[0], f"n{len(names)}"), text)


def test_same_text_in_plan_and_run(graphs: dict) -> None:
    """A bucket, its later sections, the step, and no fourth: the step's second call finds the first one's program."""
    assert len(graphs["run"]) == len(graphs["plan"]) == 3
    for (run, run_aliases), (plan, plan_aliases) in zip(graphs["run"], graphs["plan"], strict=True):
        assert _without_shardings(run) == _without_shardings(plan)
        assert run_aliases == plan_aliases
        assert plan_aliases


def test_same_split_in_plan_and_run(graphs: dict) -> None:
    for (run, _), axes in zip(graphs["run"], graphs["axes"], strict=True):
        found = {}
        for line in run[run.index("ENTRY") :].split("\n"):
            if match := re.search(r" parameter\((\d+)\)(.*)", line):
                tiles = re.search(r"devices=\[([\d,]+)\]", match[2])
                sizes = [int(size) for size in tiles[1].split(",")] if tiles else []
                found[int(match[1])] = sizes.index(CHIPS) if CHIPS in sizes else None
        assert [found[place] for place in range(len(axes))] == axes
        assert 0 in axes
        assert 1 in axes


# qkv, o, gate and up (of OPT one alone), down; OPT's 6 heads of 8 take 8 places, its 90 inner sizes 92.
WEIGHTS = {
    "llama": {"256,64", "64,128", "192,64", "64,96"},
    "opt": {"192,48", "48,64", "92,48", "48,92"},
}


def test_weights_come_as_the_shards_hold_them(graphs: dict) -> None:
    """The CPU's tiles, of which those split by inputs would lie chip by chip, are not in the graph for TPU."""
    for text, _ in [*graphs["plan"], *graphs["run"]]:
        entry = text[text.index("ENTRY") :]
        assert set(re.findall(r"= s8\[([\d,]+)\]\S* parameter", entry)) == WEIGHTS[graphs["model"]]
