"""Run by tests in a process of its own: torch_xla takes its number of chips once, when it is imported.

Reads jobs as JSON from a file and writes, beside it, what each gave: ``child_decode.py JOBS RESULTS``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from runtime.model.kv_cache import Layers
from runtime.model.sampling import Sampling
from runtime.run.session import open_session


def main(jobs_path: str, results_path: str) -> None:
    jobs = json.loads(Path(jobs_path).read_text())
    Path(results_path).write_text(json.dumps([_decode(job) for job in jobs]))


def _decode(job: dict) -> dict:
    batches = job["batches"]
    options = {
        "backend": job.get("backend", "xla"),
        "dtype": getattr(torch, job["dtype"]),
        "kv_cache_dtype": getattr(torch, job.get("kv_cache_dtype", job["dtype"])),
        "batch_size": len(batches[0]),
        "max_seq_len": job["max_seq_len"],
        "buckets": job["buckets"],
        "sampled": "samplings" in job,
    }
    with open_session(job["shards"], **options) as session:
        samplings = [Sampling(**fields) for fields in job.get("samplings", [{}])]
        places = _places(session.generator._layers)
        if job.get("warm_up", True):
            session.warm_up()
        before = session.backend.compilations()
        generations = [
            session.generate(prompts, job["new_tokens"], sampling) for sampling in samplings for prompts in batches
        ]
        recompilations = session.backend.compilations() - before
        moved = zip(places, _places(session.generator._layers), strict=True)
        return {
            "parameter_bytes": session.parameter_bytes_per_chip,
            "recompilations": recompilations,
            "caches_moved": sum(before != after for before, after in moved),
            "token_ids": [generation.token_ids for generation in generations],
            "executions": [generation.prefill_executions for generation in generations],
            "logits": [session.logits(prompts).float().tolist() for prompts in batches],
        }


def _places(layers: Layers) -> list[int]:
    """Where a cache's tensors lie in memory; on XLA they have no such place."""
    return [tensor.data_ptr() for layer in layers for tensor in layer if tensor.device.type != "xla"]


if __name__ == "__main__":
    main(*sys.argv[1:])
