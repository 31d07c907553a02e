"""Random weights: the same from files and from the seed, any slice alone, pinned values, a normal distribution."""

from __future__ import annotations

import hashlib
import json
from collections import namedtuple
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from invoke import invoke
from models import SMALL, snapshot
from safetensors import safe_open

from converters.cli import command as convert
from converters.model.families.presets import PRESETS
from converters.model.parameters import parameters
from converters.output import preflight
from converters.sources.opening import open_source
from converters.sources.random_init import STD, RandomSource

DTYPES = ("bfloat16", "float16", "float32")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
TINY = PRESETS["tiny"].with_dtype("float32")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def whole(source: RandomSource, name: str) -> torch.Tensor:
    shape = next(parameter.shape for parameter in parameters(source.config) if parameter.name == name)
    return source.rows(name, 0, shape[0])


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    """A million values of one tensor, float64."""
    config = replace(TINY, hidden_size=1024, intermediate_size=1024)
    return whole(RandomSource(config, 0), "model.layers.0.mlp.gate_proj.weight").double().flatten()


@pytest.mark.parametrize("dtype", DTYPES)
def test_seed_stands_for_the_very_files(dtype: str, tmp_path: Path) -> None:
    for storage in ("files", "seed"):
        arguments = ("--config", "tiny", "--storage", storage, "--seed", 7, "--dtype", dtype, "--layers", 2)
        invoke(convert, *arguments, "--max-shard-size", "2MB", "--out", tmp_path / storage)
    assert not list((tmp_path / "seed").glob("*.safetensors"))
    assert len(list((tmp_path / "files").glob("*.safetensors"))) > 1
    source = open_source(tmp_path / "seed")
    assert source.config == open_source(tmp_path / "files").config
    weight_map = json.loads((tmp_path / "files" / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == {parameter.name for parameter in parameters(source.config)}
    for name, file_name in weight_map.items():
        with safe_open(tmp_path / "files" / file_name, "pt") as file:
            stored = file.get_tensor(name)
        made = whole(source, name)
        assert made.dtype == stored.dtype == getattr(torch, dtype)
        assert bits(made) == bits(stored), name


def test_small_files_of_a_seed(tmp_path: Path) -> None:
    said = invoke(convert, "--config", "tiny", "--storage", "seed", "--seed", 5, "--out", tmp_path / "out").stdout
    assert "a seed" in said
    assert snapshot(tmp_path / "out").keys() == {"config.json", "random_init.json"}
    record = json.loads((tmp_path / "out" / "random_init.json").read_text())
    assert (record["format_version"], record["seed"]) == (1, 5)
    assert record["distribution"]["std"] == STD
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert (
        "already complete"
        in invoke(convert, "--config", "tiny", "--storage", "seed", "--seed", 5, "--out", tmp_path / "out").stdout
    )


@pytest.mark.parametrize("hidden", [16, 17, 36])
def test_rows_are_slices_of_the_whole(hidden: int) -> None:
    """Rows whose values begin anywhere in the generator's words and counters."""
    source = RandomSource(replace(SMALL, hidden_size=hidden, head_dim=6), 3)
    full = whole(source, Q_PROJ)
    assert full.shape == (24, hidden)
    for start in range(24):
        for stop in (start + 1, min(start + 5, 24), 24):
            assert bits(source.rows(Q_PROJ, start, stop)) == bits(full[start:stop])


def test_a_tensor_does_not_depend_on_the_model_around_it() -> None:
    """Fewer layers, another vocabulary, other heads: the seed and the name decide."""
    other = replace(SMALL, num_layers=1, vocab_size=64, num_kv_heads=4, name="other")
    assert bits(whole(RandomSource(other, 3), Q_PROJ)) == bits(whole(RandomSource(SMALL, 3), Q_PROJ))


def test_values_are_pinned() -> None:
    """A change here makes other weights of every seed that anyone has kept: raise the format version with it."""
    source = RandomSource(TINY, 0)
    digest = hashlib.sha256()
    for name in (Q_PROJ, "model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight", "model.norm.weight"):
        digest.update(bits(source.rows(name, 5, 9)))
    assert digest.hexdigest() == "adefeb27403f94ce7c8b2f75b6c48a910b18434a7b0ff9bde99d28513ef5b1a9"
    first = source.rows(Q_PROJ, 0, 1)[0, :4].tolist()
    assert first == pytest.approx(
        [0.0027429319452494383, 0.008310718461871147, 0.015520680695772171, 0.006344223394989967], abs=1e-9
    )


def test_smaller_dtypes_are_the_rounded_float32() -> None:
    exact = whole(RandomSource(TINY, 1), Q_PROJ)
    for dtype in ("bfloat16", "float16"):
        assert bits(whole(RandomSource(TINY.with_dtype(dtype), 1), Q_PROJ)) == bits(exact.to(getattr(torch, dtype)))


def test_distribution_is_normal(values: torch.Tensor) -> None:
    """A million draws: mean, spread and quantiles within about four standard errors, tails as a normal has them."""
    count = len(values)
    assert abs(values.mean()) < 4 * STD / count**0.5
    assert abs(values.std() / STD - 1) < 4 / (2 * count) ** 0.5
    ordered = values.sort().values
    normal = NormalDist(0, STD)
    for share in (0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999):
        error = (share * (1 - share) / count) ** 0.5
        assert abs(normal.cdf(ordered[int(share * count)].item()) - share) < 4 * error + 1 / 65536
    skewness = (values**3).mean() / STD**3
    kurtosis = (values**4).mean() / STD**4
    assert abs(skewness) < 4 * (6 / count) ** 0.5
    assert abs(kurtosis - 3) < 4 * (24 / count) ** 0.5
    assert values.max() == -values.min() == pytest.approx(-normal.inv_cdf(0.5 / 65536))


def test_neighbours_are_independent(values: torch.Tensor) -> None:
    """Lanes of a word, words of a counter, rows."""
    for lag in (1, 2, 3, 4, 15, 16, 17, 1024):
        correlation = (values[:-lag] * values[lag:]).mean() / STD**2
        assert abs(correlation) < 4.5 / len(values) ** 0.5, lag


def test_seeds_and_names_are_independent() -> None:
    layer = "model.layers.{}.self_attn.{}_proj.weight"
    drawn = [whole(RandomSource(TINY, seed), layer.format(0, "q")).double().flatten() for seed in (0, 1, 2, 2**63 - 1)]
    drawn += [
        whole(RandomSource(TINY, 0), layer.format(n, kind)).double().flatten() for n, kind in ((1, "q"), (0, "k"))
    ]
    for a, b in combinations(drawn, 2):
        assert abs((a * b).mean() / STD**2) < 4.5 / len(a) ** 0.5
        assert (a == b).double().mean() < 1e-3  # of 65,536 values, two draws agree by chance now and then


def test_norms_are_one() -> None:
    source = RandomSource(TINY, 0)
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert whole(source, name).tolist() == [1.0] * TINY.hidden_size


# --- where the weights go


Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """A function that makes the disk look as if so many bytes were free."""
    return lambda count: monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: Usage(2 * count, count, count)
    )


def test_auto_keeps_the_seed_where_files_do_not_fit(tmp_path: Path, free) -> None:
    free(300 * 10**9)
    said = invoke(convert, "--config", "175B", "--out", tmp_path / "out").stdout
    assert "a seed" in said
    assert "349.47 GB of files" in said
    assert "300.00 GB free" in said
    assert "--storage files" in said
    assert snapshot(tmp_path / "out").keys() == {"config.json", "random_init.json"}
    assert "already complete" in invoke(convert, "--config", "175B", "--out", tmp_path / "out").stdout


@pytest.mark.parametrize(("spare", "form"), [(1.09, "a seed"), (1.11, "1 file")])
def test_auto_wants_a_tenth_to_spare(spare: float, form: str, tmp_path: Path, free) -> None:
    size = sum(parameter.elements for parameter in parameters(PRESETS["tiny"])) * 2
    free(int(size * spare))
    assert form in invoke(convert, "--config", "tiny", "--out", tmp_path / "out").stdout
    assert (tmp_path / "out" / "random_init.json").exists() == (form == "a seed")


def test_auto_writes_files_where_they_fit(tmp_path: Path, free) -> None:
    free(10**12)
    said = invoke(convert, "--config", "tiny", "--out", tmp_path / "out").stdout
    assert "seed" not in said
    assert (tmp_path / "out" / "model-00001-of-00001.safetensors").exists()


def test_dry_run_says_the_same_and_writes_nothing(tmp_path: Path, free) -> None:
    free(300 * 10**9)
    said = invoke(convert, "--config", "175B", "--out", tmp_path / "out", "--dry-run").stdout
    assert said == invoke(convert, "--config", "175B", "--out", tmp_path / "out", "--dry-run").stdout
    assert "Kept the seed" in said
    free(10**12)
    assert "model-00001-of-00078.safetensors" in invoke(convert, "--config", "175b", "--dry-run").stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3-405b", 405_853_388_800),
        ("opt-66b", 65_719_701_504),
        ("opt-175b", 174_604_468_224),
    ],
)
def test_large_presets_as_seeds(name: str, count: int, tmp_path: Path) -> None:
    """At once, with the published number of parameters; a dry run says what the files would be."""
    said = invoke(convert, "--config", name, "--storage", "seed", "--out", tmp_path / "out").stdout
    assert f"{count:,} parameters" in said
    assert open_source(tmp_path / "out").config == PRESETS[name]
    dry = invoke(convert, "--config", name, "--storage", "files", "--out", tmp_path / "files", "--dry-run").stdout
    assert f"{count * 2 / 1e9:.2f} GB" in dry
    assert not (tmp_path / "files").exists()
