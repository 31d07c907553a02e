"""Run by tests in a process of its own: the graphs that a run compiles, and those that a plan traces for it.

``child_graph.py SHARDS RESULT``: loads the shards on virtual chips in the form for TPU, warms a generator up with one
bucket of 16 tokens, and writes both kinds of graph.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantize.shards.reading import Shards
from runtime.devices import pjrt, xla
from runtime.devices.tracing import TracedGraph, TracedTensor
from runtime.model.graphs import fill_graph, greedy_graph, later_fill_graph
from runtime.model.kv_cache import FunctionalKVCache
from runtime.plan.compiled_plan import trace_graph
from runtime.plan.plan import Workload
from runtime.run.generate import Generator
from runtime.run.load import load_decoder, make_cache

ROWS, SLOTS, BUCKET = 1, 40, 16


def main(shards_path: str, result_path: str) -> None:
    shards = Shards(Path(shards_path))
    compiled: list[TracedGraph] = []

    class Recording(pjrt.Mesh):
        def compile(self, graph: TracedGraph, options: Mapping[str, Any] | None = None) -> pjrt.Program:
            compiled.append(graph)
            return super().compile(graph, options)

    pjrt.Mesh = Recording
    backend = xla.XLABackend(shards.chips)
    backend.tiled, backend.cache_type = False, FunctionalKVCache
    backend.form, backend.fuse_bytes = xla._chip_form(xla.TPU_LEAST_ROWS, shards.chips), xla.TPU_FUSE_BYTES
    with torch.no_grad():
        decoder, _ = load_decoder(shards, shards.config, torch.bfloat16, backend, lambda *done: None)
        cache = make_cache(shards.config, backend, ROWS, SLOTS, torch.bfloat16)
        Generator(shards.config, decoder, cache, backend, [BUCKET]).warm_up()
    workload = Workload(shards.config, shards.manifest.scheme, ROWS, SLOTS)
    wanted = [(fill_graph, BUCKET), (later_fill_graph, BUCKET), (greedy_graph, 1)]
    planned = [trace_graph(workload, shards.chips, make, tokens) for make, tokens in wanted]
    content = {"run": [_content(graph) for graph in compiled], "plan": [_content(graph) for graph in planned]}
    Path(result_path).write_text(json.dumps(content))


def _content(graph: TracedGraph) -> dict[str, Any]:
    """A graph as JSON, its program as text."""
    return {
        "fingerprint": graph.fingerprint,
        "text": pjrt._exported(graph, "cpu").mlir_module(),
        "inputs": [_tensor(each) for each in graph.inputs],
        "results": [_tensor(each) for each in graph.results],
        "donated": graph.donated,
        "constants": {index: str(value.tolist()) for index, value in graph.constants.items()},
    }


def _tensor(tensor: TracedTensor) -> dict[str, Any]:
    return {"shape": tensor.shape, "dtype": str(tensor.dtype), "axis": tensor.axis}


if __name__ == "__main__":
    main(*sys.argv[1:])
