"""Tokens are drawn from exactly the distribution that temperature, top-k and top-p leave; the same on any chips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from invoke import invoke, invoke_error
from models import write_hf
from parity import decode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quantize.cli import command as quantize
from runtime.cli import command as run
from runtime.model.sampling import Sampling, sample

DRAWS = 20_000
SETTINGS = [
    Sampling(1.0),
    Sampling(0.7),
    Sampling(1.5, top_k=5),
    Sampling(1.0, top_p=0.8),
    Sampling(0.9, top_k=12, top_p=0.9),
    Sampling(1.3, top_k=1000, top_p=0.95),
]


def _expected(logits: torch.Tensor, sampling: Sampling) -> np.ndarray:
    """The distribution by transformers' own warpers, in float64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(min(sampling.top_k, logits.shape[-1])))
    warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits.double()[None])[0].softmax(-1).numpy()


def _chi_square_limit(degrees: int) -> float:
    """The 0.9999 quantile of chi-square, by Wilson and Hilferty's approximation."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_draws_follow_the_exact_distribution(sampling: Sampling) -> None:
    logits = 2 * torch.randn(60, generator=torch.Generator().manual_seed(7))
    temperature, top_k, top_p, noise = sampling.controls(DRAWS, 1)
    drawn = sample(logits.expand(DRAWS, -1), temperature, top_k, top_p, noise[0]).flatten()
    counts = np.bincount(drawn.numpy(), minlength=60)
    expected = DRAWS * _expected(logits, sampling)
    assert counts[expected == 0].sum() == 0
    rare = (expected > 0) & (expected < 10)  # too few to test alone
    groups = [(counts[n], expected[n]) for n in np.flatnonzero(expected >= 10)]
    if rare.any():
        groups.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((count - mean) ** 2 / mean for count, mean in groups)
    assert len(groups) > 1
    assert statistic < _chi_square_limit(len(groups) - 1)


def test_a_wrong_distribution_would_be_noticed() -> None:
    """The chi-square test above tells a temperature of 0.95 from one of 1."""
    logits = 2 * torch.randn(60, generator=torch.Generator().manual_seed(7))
    temperature, top_k, top_p, noise = Sampling(0.95).controls(DRAWS, 1)
    drawn = sample(logits.expand(DRAWS, -1), temperature, top_k, top_p, noise[0]).flatten()
    counts, expected = np.bincount(drawn.numpy(), minlength=60), DRAWS * _expected(logits, Sampling(1.0))
    common = expected >= 10
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    assert statistic > _chi_square_limit(int(common.sum()) - 1)


def test_temperature_zero_is_greedy_whatever_the_noise() -> None:
    logits = torch.randn(500, 40)
    _, top_k, top_p, noise = Sampling(0.0, top_k=3, top_p=0.5).controls(500, 1)
    assert torch.equal(sample(logits, torch.tensor([0.0]), top_k, top_p, noise[0])[:, 0], logits.argmax(-1))


@pytest.mark.parametrize("noise", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_the_ends_of_the_noise_draw_tokens_that_are_kept(noise: float) -> None:
    logits = torch.randn(300, 40)
    drawn = sample(logits, torch.tensor([1.0]), torch.tensor([4]), torch.tensor([1.0]), torch.full((300,), noise))
    assert (logits.topk(4).indices == drawn).any(-1).all()


def test_very_cold_is_greedy() -> None:
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(3))
    controls = Sampling(1e-30).controls(300, 1)
    assert torch.equal(sample(logits, *controls[:3], controls.noise[0])[:, 0], logits.argmax(-1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("sampling") / "hf")


@pytest.mark.slow
def test_equal_seeds_draw_equal_tokens_on_any_chips(checkpoint: Path, tmp_path: Path) -> None:
    """Settings change between batches of one process, greedy and back, and nothing is compiled for it."""
    samplings = [
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.8, "seed": 2},
        {"temperature": 1.2, "top_k": 5, "top_p": 0.9, "seed": 1},
        {},
    ]
    found = []
    for chips in (1, 2, 4):
        out = tmp_path / f"out{chips}"
        invoke(quantize, checkpoint, "--int8", "--chips", chips, "--out", out)
        job = {
            "shards": out,
            "dtype": "float32",
            "batches": [[[3, 4, 5], [6, 7, 8, 9, 10]]],
            "new_tokens": 24,
            "max_seq_len": 64,
            "buckets": [16],
            "samplings": samplings,
        }
        [result] = decode([job])
        assert result["recompilations"] == 0
        found.append(result["token_ids"])
    first, again, other, narrow, greedy = found[0]
    assert first == again
    assert len({str(tokens) for tokens in (first, other, narrow, greedy)}) == 4
    assert found[0] == found[1] == found[2]


def test_settings_without_a_temperature_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    invoke(quantize, checkpoint, "--int8", "--out", tmp_path / "out")
    for option in (("--top-k", 5), ("--top-p", 0.9)):
        assert "--temperature above 0" in invoke_error(run, "--shards", tmp_path / "out", *option)


def test_llama_run_draws_by_its_seed(checkpoint: Path, tmp_path: Path) -> None:
    import json

    invoke(quantize, checkpoint, "--int8", "--out", tmp_path / "out")
    fixed = ("--shards", tmp_path / "out", "--backend", "eager", "--prompt-ids", "3,4,5", "--temperature", 1.5)
    found = [
        json.loads(invoke(run, *fixed, "--seed", seed, "--max-new-tokens", 16, "--json", "-").stdout)["token_ids"]
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]
