"""``--dtype float32`` is float32 on a TPU too, whose products of float32 are by default those of bfloat16."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
import virtual_chips
from invoke import invoke
from models import make_model, make_opt

from quantize.cli import command as quantize
from quantize.shards.reading import Shards
from quantize.slices import find_slice
from runtime.devices import xla
from runtime.model.graphs import fill_graph, greedy_graph, later_fill_graph, logits_graph
from runtime.model.kv_cache import FunctionalKVCache
from runtime.plan.compiled_plan import trace_graph
from runtime.plan.plan import Workload
from runtime.plan.tpu_compiler import TPUCompiler
from runtime.run.generate import Generator
from runtime.run.load import load_tensors, make_cache, make_decoder

CHIPS, LAYERS = 4, 2
ROWS, SLOTS, BUCKET, TARGET = 2, 40, 16, "v4-8"
DTYPES = (torch.float32, torch.bfloat16)  # one after the other: the precision is that of a graph, not of the first
PLANNED = ((fill_graph, BUCKET), (later_fill_graph, BUCKET), (greedy_graph, 1), (logits_graph, 1))
# A layer's are qkv, two of attention, o, gate with up (of OPT the first linear), down. Filling a cache takes no more of
# the last layer than keys and values. The other two graphs have the head as well.
COUNTS = (6 * LAYERS - 5, 6 * LAYERS - 5, 6 * LAYERS + 1, 6 * LAYERS + 1)
EXACT, DEFAULT = "precision = [HIGHEST, HIGHEST]", "precision = [DEFAULT, DEFAULT]"


class Graphs(NamedTuple):
    """By dtype, what a plan and a run give to the compiler, in the form for TPU; and the float32 step compiled."""

    plan: dict[torch.dtype, list[str]]
    run: dict[torch.dtype, list[str]]
    compiled: str


@pytest.fixture(scope="module", params=["llama", pytest.param("opt", marks=pytest.mark.slow)])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        make_model(root / "hf", heads=8, kv_heads=4, hidden=64, head_dim=16, layers=LAYERS, ffn=96, vocab=224)
    else:
        make_opt(root / "hf", heads=8, hidden=64, layers=LAYERS, ffn=96, vocab=224)
    invoke(quantize, root / "hf", "--int8", "--chips", CHIPS, "--out", root / "out")
    shards = Shards(root / "out")
    workloads = {
        dtype: Workload(shards.config, shards.manifest.scheme, ROWS, SLOTS, str(dtype).removeprefix("torch."))
        for dtype in DTYPES
    }
    planned = {
        dtype: [
            virtual_chips.stablehlo_text(trace_graph(workload, CHIPS, make, tokens, dtype=dtype))
            for make, tokens in PLANNED
        ]
        for dtype, workload in workloads.items()
    }
    step = trace_graph(workloads[torch.float32], CHIPS, greedy_graph, 1, dtype=torch.float32)
    return Graphs(planned, warmed_up(shards), TPUCompiler(find_slice(TARGET)).compile(step).text)


def warmed_up(shards: Shards) -> dict[torch.dtype, list[str]]:
    """What XLA is given when a generator is warmed up on virtual chips in the form for TPU."""
    virtual_chips.start()
    backend = xla.XLABackend(shards.chips)
    backend.tiled, backend.cache_type = False, FunctionalKVCache
    backend.form, backend.fuse_bytes = xla._chip_form(xla.TPU_LEAST_ROWS, shards.chips), xla.TPU_FUSE_BYTES
    found = {}
    with torch.no_grad(), virtual_chips.quickly_compiled():
        tensors, _ = load_tensors(shards, shards.config, backend, lambda *done: None)
        for dtype in DTYPES:
            decoder = make_decoder(shards.config, dtype, backend, tensors)
            cache = make_cache(shards.config, backend, ROWS, SLOTS, dtype)
            with virtual_chips.graphs_given_to_xla() as given:
                Generator(shards.config, decoder, cache, backend, [BUCKET]).warm_up()
            found[dtype] = [virtual_chips.stablehlo_text(graph) for graph in given]
    backend.release()
    return found


def products(text: str) -> list[str]:
    return [line for line in text.splitlines() if "stablehlo.dot" in line or "stablehlo.convolution" in line]


def test_every_product_of_a_float32_plan_is_exact(graphs: Graphs) -> None:
    """Linears, both products of attention, and the head."""
    for text, count in zip(graphs.plan[torch.float32], COUNTS, strict=True):
        found = products(text)
        assert len(found) == count
        assert not [line for line in found if EXACT not in line]


def test_no_product_of_a_bfloat16_plan_is_other_than_by_default(graphs: Graphs) -> None:
    for text, count in zip(graphs.plan[torch.bfloat16], COUNTS, strict=True):
        found = products(text)
        assert len(found) == count
        assert not [line for line in found if DEFAULT not in line and "precision" in line]


def test_a_run_gives_xla_the_same(graphs: Graphs) -> None:
    """Each dtype's bucket, later sections and step, one dtype after the other in one process."""
    for dtype, texts in graphs.run.items():
        assert [len(products(text)) for text in texts] == list(COUNTS[:3])
        for line in (line for text in texts for line in products(text)):
            assert (EXACT in line) == (dtype == torch.float32)


def test_exact_attention_keeps_heads_on_their_chips(graphs: Graphs) -> None:
    """By the TPU's compiler: two all-reduces a layer and one for the embedding, as in bfloat16; nothing is gathered."""
    entry = graphs.compiled[graphs.compiled.index("\nENTRY ") :]
    assert len(re.findall(r" all-reduce(?:-start)?\(", entry)) <= 2 * LAYERS + 3
    assert len(re.findall(r" all-gather(?:-start)?\(", entry)) <= 2
    assert not re.search(r" (all-to-all|collective-permute)(-start)?\(", entry)
