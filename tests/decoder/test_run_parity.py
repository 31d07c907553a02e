"""The decoder on 1 to 8 chips against transformers holding the dequantized int8 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from invoke import invoke
from models import make_model
from parity import count_greedy, decode, logits_after, reference, relative
from transformers import PreTrainedModel

from converters.cli import command as convert
from quantize.cli import command as quantize

NEW_TOKENS = 64
BUCKETS = [16, 32]
LENGTHS = (1, 5, 17, 33, 50, 70)  # of prompts: none in a bucket, one bucket, two sections, three sections
MODELS = {
    "grouped": {"heads": 6, "kv_heads": 2, "hidden": 48, "head_dim": 16, "layers": 2, "ffn": 172, "vocab": 515},
    "tied": {"heads": 5, "kv_heads": 5, "hidden": 40, "layers": 2, "ffn": 96, "vocab": 131, "tied": True},
}


class Case(NamedTuple):
    """A model with its prompts and the reference for them."""

    checkpoint: Path
    model: PreTrainedModel
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("parity")
    made = {}
    for seed, (name, sizes) in enumerate(MODELS.items()):
        make_model(root / name / "hf", seed=seed, **sizes)
        checkpoint = root / name / "checkpoint"
        invoke(convert, "--source", root / name / "hf", "--out", checkpoint, "--dtype", "float32")
        invoke(quantize, checkpoint, "--int8", "--out", root / name / "out1")
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(3, sizes["vocab"], (length,), generator=generator).tolist() for length in LENGTHS]
        made[name] = Case(checkpoint, reference(checkpoint, root / name / "out1"), prompts)
    return made


def _jobs(cases: dict[str, Case], chips: int, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    jobs = []
    for name, case in cases.items():
        out = folder / name
        invoke(quantize, case.checkpoint, "--int8", "--chips", chips, "--out", out)
        job = {
            "shards": out,
            "dtype": "float32",
            "batches": [[prompt] for prompt in case.prompts],
            "new_tokens": NEW_TOKENS,
            "max_seq_len": 160,
            "buckets": BUCKETS,
        }
        jobs.append(job | changes)
    return jobs


@pytest.mark.parametrize("chips", [3, *(pytest.param(chips, marks=pytest.mark.slow) for chips in (1, 2, 4, 8))])
def test_float32_equals_transformers(cases: dict[str, Case], chips: int, tmp_path: Path) -> None:
    """Prefill logits within 1e-4, greedy tokens equal, nothing compiled after warm-up, memory as the files say."""
    results = decode(_jobs(cases, chips, tmp_path))
    compared = 0
    for (name, case), result in zip(cases.items(), results, strict=True):
        assert result["recompilations"] == 0
        assert result["executions"] == [0, 1, 1, 1, 2, 3]
        header = int.from_bytes((tmp_path / name / f"chip-00-of-{chips:02d}.safetensors").read_bytes()[:8], "little")
        file_bytes = (tmp_path / name / f"chip-00-of-{chips:02d}.safetensors").stat().st_size
        assert result["parameter_bytes"] == file_bytes - 8 - header
        for prompt, logits, ids in zip(case.prompts, result["logits"], result["token_ids"], strict=True):
            theirs = logits_after(case.model, prompt)[-1]
            assert relative(logits[0], theirs) < 1e-4
            compared += count_greedy(case.model, prompt, ids[0])
    assert compared >= 200


@pytest.mark.slow
def test_inductor_equals_transformers(cases: dict[str, Case], tmp_path: Path) -> None:
    """Logits within 1e-4, greedy tokens equal, nothing compiled after warm-up, the caches where they were."""
    results = decode(_jobs(cases, 1, tmp_path, backend="inductor"))
    compared = 0
    for case, result in zip(cases.values(), results, strict=True):
        assert result["recompilations"] == 0
        assert result["caches_moved"] == 0
        for prompt, logits, ids in zip(case.prompts, result["logits"], result["token_ids"], strict=True):
            assert relative(logits[0], logits_after(case.model, prompt)[-1]) < 1e-4
            compared += count_greedy(case.model, prompt, ids[0])
    assert compared >= 200


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "chips"), [("xla", 1), ("xla", 4), ("inductor", 1)])
def test_bfloat16_is_near(cases: dict[str, Case], backend: str, chips: int, tmp_path: Path) -> None:
    jobs = _jobs(cases, chips, tmp_path, backend=backend, dtype="bfloat16", new_tokens=2)
    results = decode(jobs, as_users=True)
    for case, result in zip(cases.values(), results, strict=True):
        for prompt, logits in zip(case.prompts, result["logits"], strict=True):
            assert relative(logits[0], logits_after(case.model, prompt)[-1]) < 2e-2


@pytest.mark.parametrize(
    ("backend", "chips", "rows"),
    [
        ("eager", 1, 3),
        pytest.param("inductor", 1, 3, marks=pytest.mark.slow),
        ("xla", 4, 2),
        *(pytest.param("xla", 1, rows, marks=pytest.mark.slow) for rows in (2, 4, 8)),
        *(pytest.param("xla", 4, rows, marks=pytest.mark.slow) for rows in (4, 8)),
    ],
)
def test_rows_of_different_lengths_decode_as_alone(
    cases: dict[str, Case], backend: str, chips: int, rows: int, tmp_path: Path
) -> None:
    """A batch gives row by row what single runs give, which is what the reference gives."""
    only = {"grouped": cases["grouped"]}
    generator = torch.Generator().manual_seed(rows)
    prompts = [torch.randint(3, 515, (1 + 9 * row,), generator=generator).tolist() for row in range(rows)]
    jobs = [
        *_jobs(only, chips, tmp_path, batches=[prompts], backend=backend, new_tokens=32),
        *_jobs(
            only, chips, tmp_path / "alone", batches=[[prompt] for prompt in prompts], backend=backend, new_tokens=32
        ),
    ]
    [batch, alone] = decode(jobs)
    assert batch["recompilations"] == alone["recompilations"] == 0
    compared = 0
    for prompt, logits, ids, single in zip(
        prompts, batch["logits"][0], batch["token_ids"][0], alone["token_ids"], strict=True
    ):
        assert relative(logits, logits_after(only["grouped"].model, prompt)[-1]) < 1e-4
        found = count_greedy(only["grouped"].model, prompt, ids)
        assert ids[:found] == single[0][:found]
        compared += found
    assert compared >= 20 * rows


def test_the_counter_sees_a_recompilation(cases: dict[str, Case], tmp_path: Path) -> None:
    """Without a warm-up, each bucket, the later sections and the decode step are compiled when first needed."""
    only = {"grouped": cases["grouped"]}
    [result] = decode(_jobs(only, 2, tmp_path, warm_up=False, new_tokens=2))
    assert result["recompilations"] == len(BUCKETS) + 2


@pytest.mark.slow
@pytest.mark.parametrize("chips", [1, 4])
def test_smollm2_equals_transformers(smollm2_gguf: Path, chips: int, tmp_path: Path) -> None:
    """A real model: 9 heads and 3 KV heads, padded on 4 chips."""
    invoke(convert, "--source", smollm2_gguf, "--out", tmp_path / "checkpoint", "--dtype", "float32")
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--chips", chips, "--out", tmp_path / "out")
    model = reference(tmp_path / "checkpoint", tmp_path / "out")
    prompts = [
        [504, 3575, 282, 4649, 314],
        [9099, 2402, 253, 655, 28, 665, 436, 253, 1588],
        list(range(1000, 1040)),
        [198],
        list(range(300, 420)),
    ]
    job = {
        "shards": tmp_path / "out",
        "dtype": "float32",
        "batches": [[prompt] for prompt in prompts],
        "new_tokens": NEW_TOKENS,
        "max_seq_len": 192,
        "buckets": [128],
    }
    [result] = decode([job], as_users=True)
    assert result["recompilations"] == 0
    compared = 0
    for prompt, logits, ids in zip(prompts, result["logits"], result["token_ids"], strict=True):
        assert relative(logits[0], logits_after(model, prompt)[-1]) < 1e-4
        compared += count_greedy(model, prompt, ids[0])
    assert compared >= 200


@pytest.mark.slow
def test_prompts_of_all_lengths_in_one_process(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Up to 1500 tokens in a cache of 2048: nothing compiled, few executions, and logits as token by token."""
    invoke(convert, "--source", smollm2_gguf, "--out", tmp_path / "checkpoint", "--dtype", "float32")
    invoke(quantize, tmp_path / "checkpoint", "--int8", "--out", tmp_path / "out")
    lengths = [10, 100, 127, 128, 129, 500, 513, 1000, 1500]
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(100, 40_000, (1500,), generator=generator).tolist()
    job = {
        "shards": tmp_path / "out",
        "dtype": "float32",
        "batches": [[text[:length]] for length in lengths],
        "new_tokens": 4,
        "max_seq_len": 2048,
        "buckets": [128, 256, 384, 512],
    }
    [result] = decode([job], as_users=True)
    assert result["recompilations"] == 0
    assert result["executions"] == [1, 1, 1, 1, 1, 1, 1, 2, 3]
    two_ways = {"batches": [[text[:600]]], "max_seq_len": 640, "new_tokens": 1}
    stepped, sectioned = decode([job | two_ways | {"buckets": [1]}, job | two_ways], as_users=True)
    assert (stepped["executions"], sectioned["executions"]) == ([599], [2])
    model = reference(tmp_path / "checkpoint", tmp_path / "out")
    expected = logits_after(model, text)
    for length, logits in zip(lengths, result["logits"], strict=True):
        assert relative(logits[0], expected[length - 1]) < 1e-4
    assert relative(*(way["logits"][0][0] for way in (sectioned, stepped))) < 1e-4
