"""What llama-run gives held against transformers with the dequantized weights, for tests of any model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import virtual_chips
from by_hand import decoded, quantized_names
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantize.shards.reading import Shards
from runtime.model.kv_cache import Layers
from runtime.model.sampling import Sampling
from runtime.run.session import open_session

CLOSE = 1e-3  # top two logits nearer than this may change places in float32


def decode(jobs: list[dict[str, Any]], as_users: bool = False) -> list[dict[str, Any]]:
    """What sessions in this process give for each of ``jobs``, one after the other.

    XLA compiles quickly, to programs that run slowly; ``as_users`` lets it compile as it does for users.
    """
    if any(job.get("backend", "xla") == "xla" for job in jobs):
        virtual_chips.start()
    with nullcontext() if as_users else virtual_chips.quickly_compiled():
        return [_decode(job) for job in jobs]


def _decode(job: dict[str, Any]) -> dict[str, Any]:
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
            "logits": [session.logits(prompts).float() for prompts in batches],
        }


def _places(layers: Layers) -> list[int]:
    """Where a cache's tensors lie in memory; those on chips have no such place."""
    return [tensor.data_ptr() for layer in layers for tensor in layer if isinstance(tensor, torch.Tensor)]


def reference(checkpoint: Path, shards: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model of ``checkpoint``, its linears holding what the shards stand for, in any weight format."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    whole = Shards(shards)
    tensors = {name: whole.rows(name, 0, tensor.shape[0]) for name, tensor in whole.tensors.items()}
    state = model.state_dict()
    for name in quantized_names(tensors):
        state[name].copy_(torch.from_numpy(decoded(tensors, name, state[name].shape[1])))
    return model.to(dtype)


@torch.no_grad()
def logits_after(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The logits [T, V] after every token of ``ids``, in float32, processed at once and without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of the difference over the norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def count_greedy(model: PreTrainedModel, prompt: list[int], generated: list[int]) -> int:
    """How many of our tokens are the reference's greedy choice; stops where its top two are too close to tell.

    A token that is neither fails the test.
    """
    logits = logits_after(model, prompt + generated)[len(prompt) - 1 : -1]
    for place, (token, row) in enumerate(zip(generated, logits, strict=True)):
        top = row.topk(2)
        if (top.values[0] - top.values[1]).item() < CLOSE:
            return place
        assert token == top.indices[0].item(), f"token {place}: {token}, the reference's is {top.indices[0].item()}"
    return len(generated)
