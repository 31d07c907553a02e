"""Run by tests in a process of its own: graphs in float32 and bfloat16, in the form for TPU, as a plan and as a run
have them.

``child_precision.py SHARDS RESULT``: with XLA told to write down what it is given (XLA_FLAGS), loads the shards on
virtual chips and warms a generator up in each dtype. Writes the plan's graphs as HLO text, by dtype, and what the TPU's
compiler makes of the float32 step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from child_graph import _text

from quantize.shards.reading import Shards
from quantize.shards.stored import Scheme
from quantize.slices import find_slice
from runtime.devices import xla
from runtime.model.graphs import fill_graph, greedy_graph, later_fill_graph, logits_graph
from runtime.model.kv_cache import FunctionalKVCache
from runtime.plan.compiled_plan import trace_graph
from runtime.plan.plan import Workload
from runtime.plan.tpu_compiler import TPUCompiler
from runtime.run.generate import Generator
from runtime.run.load import load_tensors, make_cache, make_decoder

ROWS, SLOTS, BUCKET, TARGET = 2, 40, 16, "v4-8"
DTYPES = (torch.float32, torch.bfloat16)  # one after the other: the precision is that of a graph, not of the first


def main(shards_path: str, result_path: str) -> None:
    shards = Shards(Path(shards_path))
    backend = xla.XLABackend(shards.chips)
    backend.tiled, backend.cache_type = False, FunctionalKVCache
    backend.form, backend.fuse_bytes = xla._chip_form(xla.TPU_LEAST_ROWS), xla.TPU_FUSE_BYTES
    with torch.no_grad():
        tensors, _ = load_tensors(shards, shards.config, backend, lambda *done: None)
        for dtype in DTYPES:
            decoder = make_decoder(shards.config, dtype, backend, tensors)
            cache = make_cache(shards.config, backend, ROWS, SLOTS, dtype)
            Generator(shards.config, decoder, cache, backend, [BUCKET]).warm_up()
    workload = Workload(shards.config, Scheme(shards.manifest.scheme.name), ROWS, SLOTS)
    wanted = [(fill_graph, BUCKET), (later_fill_graph, BUCKET), (greedy_graph, 1), (logits_graph, 1)]
    content = {}
    for dtype in DTYPES:
        graphs = [trace_graph(workload, shards.chips, make, tokens, dtype=dtype) for make, tokens in wanted]
        content[str(dtype)] = [_text(graph.hlo) for graph in graphs]
    step = trace_graph(workload, shards.chips, greedy_graph, 1, dtype=torch.float32)
    content["compiled"] = asdict(TPUCompiler(find_slice(TARGET)).compile(step))
    Path(result_path).write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
