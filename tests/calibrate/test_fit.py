"""--fit: the choice against all there are, its losses against float64 and transformers' gradients, its shards."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrated import make_inputs
from invoke import invoke, refuse
from models import make_model, make_opt
from parity import reference
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from converters.model.families.presets import PRESETS
from converters.sources.opening import open_source
from quantize.calibration.calibrator import FitTarget
from quantize.calibration.knapsack import choose
from quantize.calibration.losses import predicted_losses
from quantize.calibration.moments import Moments
from quantize.calibration.target import fit_target
from quantize.cli import command as quantize
from quantize.formats.table import FORMATS
from quantize.shards.reading import Shards
from quantize.shards.scheme import Scheme, choices
from quantize.shards.source import ShardsSource
from runtime.calibrate.fit import candidates, fit
from runtime.calibrate.measure import measure_divergence
from runtime.calibrate.sensitivity import gather_gradients
from runtime.model.sizing import parameter_bytes_per_chip
from runtime.plan.chips import chip_of

SIZES = {"heads": 4, "kv_heads": 2, "hidden": 64, "layers": 3, "ffn": 96, "vocab": 151}


@pytest.mark.parametrize("seed", range(20))
def test_the_best_choice_of_all(seed: int) -> None:
    """Against all choices of small problems, where a step of the budget is one unit."""
    random = np.random.default_rng(seed)
    costs = [random.integers(0, 30, size).tolist() for size in random.integers(1, 5, 5)]
    losses = [random.random(len(each)).tolist() for each in costs]
    for budget in (sum(map(min, costs)) - 1, sum(map(min, costs)), 40, 70, 1000):
        every = [
            sum(loss[n] for loss, n in zip(losses, numbers, strict=True))
            for numbers in itertools.product(*(range(len(each)) for each in costs))
            if sum(cost[n] for cost, n in zip(costs, numbers, strict=True)) <= budget
        ]
        found = choose(costs, losses, budget)
        if found is None:
            assert not every
            continue
        assert sum(cost[n] for cost, n in zip(costs, found, strict=True)) <= budget
        assert sum(loss[n] for loss, n in zip(losses, found, strict=True)) == pytest.approx(min(every), abs=1e-12)


def test_large_costs() -> None:
    """Bytes in their billions: within a step's rounding of the relaxed problem's bound, and within the budget."""
    random = np.random.default_rng(0)
    sizes = random.integers(10**6, 10**8, 300)
    costs = [[int(size * bits / 8) for bits in (4.25, 4.5, 8, 16)] for size in sizes]
    losses = [[float(scale * loss) for loss in (1.0, 0.8, 0.01, 0.0)] for scale in random.random(300)]
    budget = int(0.6 * sum(each[-1] for each in costs))
    found = choose(costs, losses, budget)
    assert sum(cost[n] for cost, n in zip(costs, found, strict=True)) <= budget
    lost = sum(loss[n] for loss, n in zip(losses, found, strict=True))
    # By duality no choice loses less than this for any price of a byte.
    prices = np.geomspace(1e-12, 1e-6, 400)
    things = [list(zip(*each, strict=True)) for each in zip(costs, losses, strict=True)]
    bound = max(
        sum(min(lost + price * cost for cost, lost in each) for each in things) - price * budget for price in prices
    )
    assert bound <= lost <= bound + 0.01 * sum(each[0] for each in losses)


def test_predicted_losses(tmp_path: Path) -> None:
    """Half the sum of G_i m_j dW_ij^2, in float64, for every weight and format."""
    make_model(tmp_path / "hf", **SIZES)
    source = open_source(tmp_path / "hf")
    linears = {name: each for name, each in choices(source.config).items() if each.in_block}
    random = torch.Generator().manual_seed(0)
    moments, gradients = (
        Moments({name: torch.rand(each.shape[axis], generator=random) for name, each in linears.items()})
        for axis in (1, 0)
    )
    tried = candidates(source.config, zero_points=True)
    assert tried["model.layers.0.mlp.down_proj.weight"] == ["int4-g32-zp", "int8", "unquantized"]
    assert tried["model.layers.0.mlp.up_proj.weight"] == ["int4-g64-zp", "int4-g32-zp", "int8", "unquantized"]
    done = []
    found = predicted_losses(source, source.config, tried, moments, gradients, lambda count, *_: done.append(count))
    assert sum(done) == sum(each.elements for each in linears.values())
    for name, each in linears.items():
        weight = source.rows(name, 0, each.shape[0])
        for form in tried[name]:
            error = 0.0
            if form != "unquantized":
                coded = FORMATS[form].encode(weight, importance=moments.by_weight[name])
                error = FORMATS[form].decode(coded.tensors).double() - weight.double()
            G, m = gradients.by_weight[name].double(), moments.by_weight[name].double()
            assert found[name][form] == pytest.approx(float(0.5 * (G[:, None] * m * error**2).sum()), rel=1e-5)


def expected_gradients(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """By weight, the mean square of the gradients by a linear's outputs, for tokens drawn as the tool draws them."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def add(module: torch.nn.Module, _inputs: object, by_output: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + by_output[0].flatten(0, -2).square().sum(0)

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_full_backward_hook(hook(f"{name}.weight"))
    generator = torch.Generator().manual_seed(0)
    for window in windows:
        scores = model(window[None], use_cache=False).logits[0].log_softmax(-1)
        drawn = torch.multinomial(scores.detach().float().exp(), 1, generator=generator)
        scores.gather(1, drawn).sum().backward()
    return {name: total / windows.numel() for name, total in sums.items()}


@pytest.mark.parametrize("kind", ["grouped", "tied", "opt"])
def test_gradients(kind: str, tmp_path: Path) -> None:
    if kind == "opt":
        make_opt(tmp_path / "hf", heads=4, hidden=48, ffn=70, vocab=211, width=37, do_layer_norm_before=False)
    else:
        make_model(tmp_path / "hf", **SIZES, tied=kind == "tied")
    source = open_source(tmp_path / "hf")
    windows = torch.randint(source.config.vocab_size, (3, 19), generator=torch.Generator().manual_seed(5))
    done = []
    found = gather_gradients(source, source.config, windows, tmp_path / "s", "key", lambda count: done.append(count))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    theirs = expected_gradients(model, windows)
    assert found.by_weight.keys() == theirs.keys()
    for name, squares in found.by_weight.items():
        torch.testing.assert_close(squares.double(), theirs[name], rtol=1e-3, atol=1e-5 * float(theirs[name].max()))
    assert (sum(done), list((tmp_path / "s").glob("*"))) == (2 * source.config.num_layers, [])


def test_measured_divergence(tmp_path: Path) -> None:
    """Against float64 of transformers' logits, the rounded model's from the test's own decoding."""
    make_model(tmp_path / "hf", **SIZES)
    invoke(quantize, tmp_path / "hf", "--int4", "--group-size", 32, "--chips", 2, "--out", tmp_path / "out")
    source, shards = open_source(tmp_path / "hf"), Shards(tmp_path / "out")
    windows = torch.randint(source.config.vocab_size, (3, 19), generator=torch.Generator().manual_seed(5))
    found = measure_divergence(source, ShardsSource(shards), source.config, windows, lambda count: None)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    rounded = reference(tmp_path / "hf", tmp_path / "out").double()
    with torch.no_grad():
        p, q = (model(windows, use_cache=False).logits.log_softmax(-1) for model in (exact, rounded))
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    assert found.mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.error == pytest.approx(float(kl.std() / len(kl) ** 0.5), rel=1e-3)


@pytest.mark.parametrize("chips", [1, 3])
def test_shards(chips: int, tmp_path: Path) -> None:
    """Within the size, the predicted loss falls with it, and what is said is what lies in the shards."""
    checkpoint, text = make_inputs(tmp_path)
    config = open_source(checkpoint).config
    before = float("inf")
    sizes = [parameter_bytes_per_chip(config, fit_scheme(config, chips, share), chips) for share in (0.0, 0.3, 0.7)]
    for number, size in enumerate(sizes):
        out = tmp_path / f"out{number}"
        options = ("--calibrate", text, "--moments", tmp_path / "moments", "--chips", chips, "--out", out)
        done = invoke(quantize, checkpoint, "--fit", f"{size}B", *options)
        shards = Shards(out)
        assert parameter_bytes_per_chip(config, shards.scheme, chips) <= size
        predicted = float(re.search(r"Predicted loss: ([\d.]+)", done.stdout)[1])
        assert predicted < before or predicted == before == 0
        before = predicted
        assert re.search(r"Measured over \d+ tokens .*: [\d.]+ \+- [\d.]+ nats", done.stdout)
        assert json.loads((out / "shards.json").read_text())["calibration"]["tokens"]
    again = invoke(quantize, checkpoint, "--fit", f"{size}B", *options)
    assert "already complete" in again.stdout


def fit_scheme(config: ModelConfig, chips: int, share: float) -> Scheme:
    """What is chosen by made-up losses for a size between the smallest and the largest."""
    losses = made_up(config)
    least = smallest(config, losses, chips)
    most = parameter_bytes_per_chip(config, Scheme("int8"), chips)
    return fit(config, losses, FitTarget("", chips, weight_bytes=int(least + share * (most - least)))).scheme


def made_up(config: ModelConfig) -> dict[str, dict[str, float]]:
    rank = {"int4-g128": 1.0, "int4-g64": 0.9, "int4-g32": 0.7, "int8": 0.01, "unquantized": 0.001}
    return {name: {form: rank[form] for form in forms} for name, forms in candidates(config, False).items()}


def smallest(config: ModelConfig, losses: dict[str, dict[str, float]], chips: int) -> int:
    """The least size that something is chosen for, by halving."""
    low, high = 0, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fit(config, losses, FitTarget("", chips, weight_bytes=middle))
            high = middle
        except InputError:
            low = middle
    return high


@pytest.mark.slow
def test_the_compiler_agrees() -> None:
    """A few layers of 65B, on chips that hold them only as a mixture: what the compiled programs need is there."""
    config = replace(PRESETS["65B"].with_dtype("bfloat16").cut(12), vocab_size=1024)
    target = fit_target("v5e-1", None, 1, 256)
    found = fit(config, made_up(config), target)
    assert found.scheme.overrides
    assert found.parameter_bytes <= chip_of(target.slice).hbm_bytes
    assert "By the TPU's compiler each chip of v5e-1 needs" in found.lines[0]


def test_refused(tmp_path: Path) -> None:
    checkpoint, text = make_inputs(tmp_path)
    calibrate, out = ("--calibrate", text, "--calibration-tokens", 512), ("--out", tmp_path / "out")
    for options, says in (
        (("--fit", "v4-8"), ["--calibrate"]),
        (("--fit", "v4-9", *calibrate), ["Unknown slice", "14GB"]),
        (("--fit", "v4-8", "--chips", 3, *calibrate), ["contradicts", "4 chips"]),
        (("--fit", "v4-8", "--int8", *calibrate), ["--fit chooses formats itself"]),
        (("--fit", "1kB", *calibrate), ["doesn't fit", "smallest formats"]),
    ):
        refuse(tmp_path, quantize, checkpoint, *options, *out, says=says)
