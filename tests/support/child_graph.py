"""Run by tests in a process of its own: the graphs that a run gives to XLA, and those that a plan traces for it.

``child_graph.py SHARDS RESULT``: loads the shards on virtual chips in the form for TPU, warms a generator up with one
bucket of 16 tokens, and writes both kinds of graph as HLO text.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from quantize.shards.reading import Shards
from quantize.shards.stored import Scheme
from runtime.devices import xla
from runtime.model.device_form import Form
from runtime.model.graphs import fill_graph, greedy_graph, later_fill_graph
from runtime.model.kv_cache import FunctionalKVCache
from runtime.plan.compiled_plan import trace_graph
from runtime.plan.plan import Workload
from runtime.run.generate import Generator
from runtime.run.load import load_decoder, make_cache

ROWS, SLOTS, BUCKET = 1, 40, 16


def main(shards_path: str, result_path: str) -> None:
    shards = Shards(Path(shards_path))
    traced: list[tuple[str, dict[int, int]]] = []

    class Recorded(xla._Trace):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            traced.append((_text(self.hlo()), self.aliases))

    backend = xla.XLABackend(shards.chips)
    backend.tiled, backend.cache_type = False, FunctionalKVCache
    backend.form, backend.fuse_bytes = Form(least_rows=xla.TPU_LEAST_ROWS), xla.TPU_FUSE_BYTES
    with torch.no_grad():
        decoder, _ = load_decoder(shards, shards.config, torch.bfloat16, backend, lambda *done: None)
        cache = make_cache(shards.config, backend, ROWS, SLOTS, torch.bfloat16)
        plain, xla._Trace = xla._Trace, Recorded
        Generator(shards.config, decoder, cache, backend, [BUCKET]).warm_up()
        xla._Trace = plain
    workload = Workload(shards.config, Scheme(shards.manifest.scheme.name), ROWS, SLOTS)
    wanted = [(fill_graph, BUCKET), (later_fill_graph, BUCKET), (greedy_graph, 1)]
    planned = [trace_graph(workload, shards.chips, make, tokens) for make, tokens in wanted]
    content = {
        "run": [(text, sorted(aliases.items())) for text, aliases in traced],
        "plan": [(_text(graph.hlo), sorted(graph.aliases.items())) for graph in planned],
        "axes": [graph.shard_axes for graph in planned],
    }
    Path(result_path).write_text(json.dumps(content))


def _text(hlo: bytes) -> str:
    from jax._src.lib import xla_client

    return re.sub(r"HloModule \S+", "HloModule", xla_client.XlaComputation(hlo).as_hlo_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
