"""What llama-run gives held against transformers with the dequantized weights, for tests of any model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantize.shards.reading import Shards

CHILD = Path(__file__).with_name("child_decode.py")
# LLVM's optimizations take most of the time of compiling for the CPU, and the program that LLVM is given is the same
# without them: they come after all of XLA's own passes.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0"
CLOSE = 1e-3  # top two logits nearer than this may change places in float32


# What a child does to have something registered that the product doesn't know, before it decodes.
_REGISTERED = """
import sys
from importlib import import_module
sys.path.insert(0, sys.argv[4])
import_module(sys.argv[3]).register()
import_module("child_decode").main(*sys.argv[1:3])
"""


def decode(
    jobs: list[dict[str, Any]], folder: Path, as_users: bool = False, registering: str | None = None
) -> list[dict[str, Any]]:
    """Run child_decode.py on ``jobs``, which are all for the same number of chips.

    XLA compiles quickly, to programs that run slowly; ``as_users`` tells it to compile as it does for users.
    ``registering`` is a module of this folder whose ``register`` the child calls first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    environment = {key: value for key, value in os.environ.items() if key not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    if not as_users:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY_COMPILED}".strip()
    files = [str(folder / "jobs.json"), str(folder / "results.json")]
    program = [str(CHILD), *files]
    if registering is not None:
        program = ["-c", _REGISTERED, *files, registering, str(CHILD.parent)]
    done = subprocess.run(
        [sys.executable, *program],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr[-4000:]}"
    return json.loads((folder / "results.json").read_text())


def reference(checkpoint: Path, shards: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model of ``checkpoint``, its linears holding what the int8 shards stand for."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    stored = Shards(shards)
    state = model.state_dict()
    for name in stored.tensors:
        if name.endswith("_scale"):
            weight = name.removesuffix("_scale")
            rows = state[weight].shape[0]
            state[weight].copy_(stored.rows(weight, 0, rows).float() * stored.rows(name, 0, rows))
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
