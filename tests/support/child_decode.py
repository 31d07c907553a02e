"""Run by tests in a process of its own: torch_xla takes its number of chips once, when it is imported.

Reads jobs as JSON from a file and writes, beside it, what each gave: ``child_decode.py JOBS RESULTS``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from quantize.shards.reading import Shards
from runtime.devices.backend import Backend
from runtime.devices.host import HostBackend
from runtime.model.kv_cache import Layers
from runtime.model.sampling import Sampling
from runtime.run.generate import Generator
from runtime.run.load import load_decoder, make_cache


def main(jobs_path: str, results_path: str) -> None:
    jobs = json.loads(Path(jobs_path).read_text())
    chips = {Shards(Path(job["shards"])).chips for job in jobs}
    backend = _backend(jobs[0].get("backend", "xla"), *chips)
    with torch.no_grad():
        results = [_decode(job, backend) for job in jobs]
    Path(results_path).write_text(json.dumps(results))


def _backend(name: str, chips: int) -> Backend:
    if name != "xla":
        return HostBackend(name)
    from runtime.devices.xla import XLABackend

    return XLABackend(chips)


def _decode(job: dict, backend: Backend) -> dict:
    shards = Shards(Path(job["shards"]))
    dtype = getattr(torch, job["dtype"])
    decoder, parameter_bytes = load_decoder(shards, shards.config, dtype, backend, lambda *done: None)
    batches = job["batches"]
    cache_dtype = getattr(torch, job.get("kv_cache_dtype", job["dtype"]))
    cache = make_cache(shards.config, backend, len(batches[0]), job["max_seq_len"], cache_dtype)
    samplings = [Sampling(**fields) for fields in job.get("samplings", [{}])]
    places = _places(cache.layers)
    generator = Generator(shards.config, decoder, cache, backend, job["buckets"], sampled="samplings" in job)
    if job.get("warm_up", True):
        generator.warm_up()
    before = backend.compilations()
    generations = [
        generator.generate(prompts, job["new_tokens"], sampling) for sampling in samplings for prompts in batches
    ]
    recompilations = backend.compilations() - before
    return {
        "parameter_bytes": parameter_bytes,
        "recompilations": recompilations,
        "caches_moved": sum(before != after for before, after in zip(places, _places(generator._layers), strict=True)),
        "token_ids": [generation.token_ids for generation in generations],
        "executions": [generation.prefill_executions for generation in generations],
        "logits": [generator.logits(prompts).float().tolist() for prompts in batches],
    }


def _places(layers: Layers) -> list[int]:
    """Where a cache's tensors lie in memory; on XLA they have no such place."""
    return [tensor.data_ptr() for layer in layers for tensor in layer if tensor.device.type != "xla"]


if __name__ == "__main__":
    main(*sys.argv[1:])
