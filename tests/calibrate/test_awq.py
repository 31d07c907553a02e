"""Inputs scaled by their importance: the model computes what it did, and rounded it loses less."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import SIZES, make_inputs, spread, write_text
from invoke import invoke, notes, refuse
from mixtures import shard
from models import make_model, make_opt, snapshot
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters.cli import command as convert
from converters.console.errors import InputError
from converters.model.config import ModelConfig
from converters.model.parameters import parameters
from converters.sources.opening import open_source
from converters.sources.source import TensorSource
from quantize.calibration import awq
from quantize.calibration.awq import Scaled, ScaledSource, Scaler, places
from quantize.calibration.moments import Moments, read_moments
from quantize.cli import command as quantize
from quantize.formats.table import FORMATS
from quantize.shards.reading import Shards
from quantize.shards.scheme import choices

LLAMA = {key: size for key, size in SIZES.items() if key != "layers"} | {"layers": 2}
PLACES = {
    "llama": ["input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"],
    "gqa": ["input_layernorm", "post_attention_layernorm", "mlp.up_proj"],
    "opt": ["self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj", "fc1"],
    "opt-post-norm": ["self_attn.v_proj", "fc1"],
    "opt-plain-norm": ["self_attn.v_proj", "fc1"],
}


def make(kind: str, directory: Path, dtype: torch.dtype = torch.bfloat16) -> TensorSource:
    if kind in ("llama", "gqa"):
        make_model(directory, **LLAMA | {"kv_heads": 4 if kind == "llama" else 2}, dtype=dtype)
    else:
        fields: dict[str, Any] = {
            "opt": {},
            "opt-post-norm": {"do_layer_norm_before": False},
            "opt-plain-norm": {"layer_norm_elementwise_affine": False},
        }[kind]
        make_opt(directory, heads=4, hidden=128, layers=2, ffn=320, vocab=211, dtype=dtype, **fields)
    return open_source(directory)


def some_moments(config: ModelConfig) -> Moments:
    """Of inputs that differ a hundredfold; the same where linears share their inputs, and a few are always zero."""
    found = {}
    for name, each in choices(config).items():
        draw = torch.Generator().manual_seed(each.shape[1])
        found[name] = torch.exp(2 * torch.randn(each.shape[1], generator=draw)).square()
        found[name][[3, 50]] = 0
    return Moments(found)


def scaler(source: TensorSource, form: str = "int4-g64", formats: dict[str, str] | None = None) -> Scaler:
    linears = {name: each for name, each in choices(source.config).items() if each.in_block}
    chosen = {name: FORMATS[(formats or {}).get(name, form)] for name in linears}
    return Scaler(source, source.config, linears, chosen, frozenset(), some_moments(source.config))


def always(monkeypatch: pytest.MonkeyPatch, alpha: float) -> None:
    """Let this alpha be taken everywhere."""
    monkeypatch.setattr(awq, "_STEPS", 1)
    factors = awq._factors
    monkeypatch.setattr(awq, "_factors", lambda mean_square, _: factors(mean_square, alpha))
    monkeypatch.setattr(Scaler, "_cost", lambda self, samples, found: 1.0 if found is None else 0.0)


def scaled_all(each: Scaler) -> dict[str, Scaled]:
    prefix = f"{each.config.architecture.prefix}layers."
    return {f"{prefix}{number}.": each.scale(f"{prefix}{number}.") for number in range(each.config.num_layers)}


def load(directory: Path, source: TensorSource) -> PreTrainedModel:
    """transformers' model in float64 with a source's values."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    for each in parameters(source.config):
        model.state_dict()[each.name].copy_(source.rows(each.name, 0, each.shape[0]))
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", PLACES)
def test_the_same_model(
    kind: str, dtype: torch.dtype, alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rounding to a format all logits stay, although norms and biases are rounded to their dtype."""
    source = make(kind, tmp_path, dtype)
    always(monkeypatch, alpha)
    scaled = scaled_all(scaler(source))
    assert all(list(each.alphas) == PLACES[kind] for each in scaled.values())
    changed = ScaledSource(source, scaled)
    for each in parameters(source.config):
        found, before = (of.rows(each.name, 0, each.shape[0]) for of in (changed, source))
        if found.dim() == 1:  # stored as it is
            assert found.dtype == dtype
        moved = {name for layer in scaled.values() for name in layer.changes}
        assert torch.equal(found.float(), before.float()) == (each.name not in moved)
    ids = list(range(0, 211, 3))
    before, after = logits(load(tmp_path, source), ids), logits(load(tmp_path, changed), ids)
    exact = kind.startswith("opt") and dtype != torch.float16  # powers of two
    assert ((after - before).norm() / before.norm()).item() < (1e-12 if exact else 3e-6)


def test_rows_in_any_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("llama", tmp_path)
    always(monkeypatch, 0.7)
    changed = ScaledSource(source, scaled_all(scaler(source)))
    for each in parameters(source.config):
        whole = changed.rows(each.name, 0, each.shape[0])
        parts = [
            changed.rows(each.name, start, min(start + 37, each.shape[0])) for start in range(0, each.shape[0], 37)
        ]
        assert torch.equal(torch.cat(parts), whole)


def brute_force(each: Scaler, prefix: str, taken_by: tuple[str, ...], norm: torch.Tensor | None) -> list[float]:
    """What each alpha costs the outputs, over all rows in float64."""
    costs = []
    for step in range(21):
        total = 0.0
        for name in (f"{prefix}{linear}.weight" for linear in taken_by):
            moments = each.moments.by_weight[name].double()
            root = moments.sqrt()
            mean = root[root > 0].log().mean()
            s = torch.where(root > 0, (root.log() - mean).mul(step / 20).exp(), 1.0)
            if norm is not None and step:
                s = norm.double() / (norm.double() / s).to(norm.dtype).double()
            weight = each.source.rows(name, 0, each.linears[name].shape[0]).double() * s
            form = each.formats[name]
            made = form.decode(form.encode(weight.float(), importance=(moments / s**2).float()).tensors).double()
            total += (((made - weight) / s).square() * moments).sum().item()
        costs.append(total)
    return costs


@pytest.mark.parametrize("form", ["int4-g64", "int4-g32-zp", "int8", "fp8"])
def test_the_best_alpha(form: str, tmp_path: Path) -> None:
    """Of the 21 the one that costs least; 0 where none costs less."""
    source = make("llama", tmp_path)
    each = scaler(source, form)
    prefix = "model.layers.1."
    alphas = each.scale(prefix).alphas
    assert list(alphas) == PLACES["llama"]
    for place in places(source.config)[0]:
        is_norm = "norm" in place.made_by
        norm = source.rows(f"{prefix}{place.made_by}.weight", 0, 128) if is_norm else None
        costs = brute_force(each, prefix, place.taken_by, norm)
        taken = costs[round(alphas[place.made_by] * 20)]
        assert taken <= min(costs) * 1.0001
    assert form == "fp8" or any(alphas.values())


def test_a_sample_of_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many rows of a weight are looked at, from its first to its last; what is found holds for all."""
    source = make("llama", tmp_path)
    for count, rows in ((512, 512), (513, 512), (700, 512), (11008, 512)):
        stretches = list(awq._stretches(count))
        assert sum(stop - start for start, stop in stretches) == rows
        assert (stretches[0][0], stretches[-1][1]) == (0, count)
        assert all(stop - start == 32 or count == 512 for start, stop in stretches)
    whole = scaler(source).scale("model.layers.0.").alphas
    monkeypatch.setattr(awq, "_ROWS", 64)
    part = scaler(source).scale("model.layers.0.").alphas
    assert all(abs(whole[name] - part[name]) <= 0.15 for name in whole)


def test_nothing_moves_where_inputs_are_alike(tmp_path: Path) -> None:
    source = make("llama", tmp_path)
    each = scaler(source)
    alike = Moments({name: torch.full_like(moments, 3.0) for name, moments in each.moments.by_weight.items()})
    scaled = Scaler(source, each.config, each.linears, each.formats, frozenset(), alike).scale("model.layers.0.")
    assert set(scaled.alphas.values()) == {0.0}
    assert scaled.changes == {}


def test_norms_with_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input whose norm's weight is 0 stays as it is; negative weights are as good as others."""
    model = make_model(tmp_path, **LLAMA, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[[0, 9]] = 0
        model.model.layers[0].input_layernorm.weight[20:40] *= -1
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    always(monkeypatch, 1.0)
    changed = ScaledSource(source, scaled_all(scaler(source)))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(changed.rows(name, 0, 9)[:, [0, 9]], source.rows(name, 0, 9)[:, [0, 9]].float())
    ids = list(range(50))
    before, after = logits(load(tmp_path, source), ids), logits(load(tmp_path, changed), ids)
    assert ((after - before).norm() / before.norm()).item() < 3e-6


def test_weights_that_are_not_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one are divided by powers of two; where none of a place is quantized nothing moves."""
    source = make("llama", tmp_path)
    up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    formats = {up: "bf16", "model.layers.0.self_attn.o_proj.weight": "bf16"}
    each = scaler(source, formats=formats)
    assert list(each.scale("model.layers.0.").alphas) == [*PLACES["llama"][:2], "mlp.up_proj"]
    always(monkeypatch, 1.0)
    changes = each.scale("model.layers.0.").changes
    assert torch.equal(changes[down].columns.log2().round().exp2(), changes[down].columns)
    assert changes[up].rows is changes[down].columns


@torch.no_grad()
def divergence(checkpoint: Path, shards: Path, ids: list[int]) -> float:
    """KL of what shards stand for from the checkpoint, in nats per token."""
    whole, models = Shards(shards), []
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    rounded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    for each in parameters(whole.config):
        rounded.state_dict()[each.name].copy_(whole.dequantized(each.name, 0, each.shape[0]))
    models = [logits(model.eval(), ids).log_softmax(-1) for model in (exact, rounded)]
    return (models[0].exp() * (models[0] - models[1])).sum(-1).mean().item()


@pytest.mark.parametrize("format_options", [("--int4", "--group-size", 64), ("--int8",)], ids=["int4", "int8"])
def test_it_loses_less(format_options: tuple[object, ...], tmp_path: Path) -> None:
    """Than with scales alone, over other text than was looked at; shards and what llama-convert makes of them agree."""
    checkpoint, text = make_inputs(tmp_path)
    other = json.loads(write_text(tmp_path / "other.json", seed=5, count=400).read_text())
    losses = {}
    for method in ("scale", "awq"):
        options = (*format_options, "--calibrate", text, "--moments", tmp_path / "m", "--method", method)
        result = invoke(quantize, checkpoint, *options, "--out", tmp_path / method)
        losses[method] = divergence(checkpoint, tmp_path / method, other)
    assert losses["awq"] < 0.85 * losses["scale"]
    assert any(
        "Inputs were scaled in" in line and "of 12 places, by a mean alpha of 0." in line for line in notes(result)
    )
    assert any("self_attn.o_proj, since query heads share values" in line for line in notes(result))


@pytest.mark.parametrize("form", ["int4-g64", "int8"])
def test_what_the_shards_hold(form: str, tmp_path: Path) -> None:
    """The scaled weights, encoded with the moments of the scaled inputs; the report's errors are of these."""
    checkpoint, text = make_inputs(tmp_path)
    options = ("--int4", "--group-size", 64) if form == "int4-g64" else ("--int8",)
    options = (*options, "--calibrate", text, "--moments", tmp_path / "m", "--method", "awq")
    invoke(quantize, checkpoint, *options, "--out", tmp_path / "out")
    source, made = open_source(checkpoint), Shards(tmp_path / "out")
    each = replace(scaler(source, form), moments=read_moments(tmp_path / "m" / "moments.safetensors", source.config))
    changed, prefix = ScaledSource(source, scaled := scaled_all(each)), "model.layers.2."
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())["tensors"]
    for name, parameter in each.linears.items():
        if not name.startswith(prefix):
            continue
        columns = (change := scaled[prefix].changes.get(name)) and change.columns
        importance = each.moments.by_weight[name] / (1.0 if columns is None else columns.square())
        weight = changed.rows(name, 0, parameter.shape[0]).float()
        encoded = FORMATS[form].encode(weight, importance=importance)
        for suffix, tensor in encoded.tensors.items():
            assert torch.equal(made.rows(name + suffix, 0, len(tensor)), tensor), name + suffix
        difference = FORMATS[form].decode(encoded.tensors) - weight
        sums = [(values.double().square() * importance.double()).sum().item() for values in (difference, weight)]
        assert report[name]["output_error"] == pytest.approx((sums[0] / sums[1]) ** 0.5, rel=1e-5)
    norm = prefix + "input_layernorm.weight"
    assert torch.equal(made.rows(norm, 0, 128), changed.rows(norm, 0, 128))


def test_opt(tmp_path: Path) -> None:
    """Biases and norms are divided with the weights; the loss falls, and nothing has to stay."""
    model = make_opt(tmp_path / "hf", heads=4, hidden=128, layers=2, ffn=320, vocab=211, positions=512)
    for layer in model.model.decoder.layers:
        spread(layer.self_attn_layer_norm.weight, layer.final_layer_norm.weight)
    model.save_pretrained(tmp_path / "hf")
    text = write_text(tmp_path / "text.json")
    losses = {}
    for method in ("scale", "awq"):
        options = ("--int4", "--group-size", 64, "--calibrate", text, "--moments", tmp_path / "m", "--method", method)
        result = invoke(quantize, tmp_path / "hf", *options, "--out", tmp_path / method)
        losses[method] = divergence(tmp_path / "hf", tmp_path / method, [*range(211)] * 2)
    assert losses["awq"] < 0.9 * losses["scale"]
    assert not any("can be scaled without changing" in line for line in notes(result))


def test_post_norm_is_said(tmp_path: Path) -> None:
    make("opt-post-norm", tmp_path / "hf")
    text = write_text(tmp_path / "text.json")
    options = ("--int4", "--group-size", 64, "--calibrate", text, "--method", "awq")
    result = invoke(quantize, tmp_path / "hf", *options, "--out", tmp_path / "out")
    [line] = [line for line in notes(result) if "can be scaled without changing" in line]
    assert "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, fc1, which are the residual stream too" in line
    plain = Shards(tmp_path / "out")
    name = "model.decoder.layers.0.self_attn_layer_norm.weight"
    assert torch.equal(plain.rows(name, 0, 128), open_source(tmp_path / "hf").rows(name, 0, 128))


def test_what_is_kept_is_not_scaled(tmp_path: Path) -> None:
    """int8 of a source that holds it stays bit for bit, so awq has nothing to do there; in another format it has."""
    checkpoint, text = make_inputs(tmp_path)
    invoke(quantize, checkpoint, "--int8", "--out", tmp_path / "shards")
    invoke(convert, "--source", tmp_path / "shards", "--keep-int8", "--out", tmp_path / "kept")
    options = ("--calibrate", text, "--moments", tmp_path / "m", "--method", "awq")
    says = ["--method awq finds nothing to scale", "kept as the source has them"]
    refuse(tmp_path, quantize, tmp_path / "kept", "--int8", *options, "--out", tmp_path / "a", says=says)
    invoke(quantize, tmp_path / "kept", "--int4", "--group-size", 64, *options, "--out", tmp_path / "b")
    source = open_source(tmp_path / "kept")
    before = source.rows("model.layers.0.input_layernorm.weight", 0, 128)
    after = Shards(tmp_path / "b").rows("model.layers.0.input_layernorm.weight", 0, 128)
    assert not torch.equal(before, after)
    # With error feedback they stay too, and the layers behind them are rounded for what they give.
    feedback = ("--int8", "--calibrate", text, "--method", "gptq", "--out", tmp_path / "c")
    invoke(quantize, tmp_path / "kept", *feedback)
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(Shards(tmp_path / "c").rows(name, 0, 128), Shards(tmp_path / "shards").rows(name, 0, 128))


def test_mixtures(tmp_path: Path) -> None:
    """Formats by weight: the same values on any number of chips, of the same model."""
    checkpoint, text = make_inputs(tmp_path)
    names = [each.name for each in parameters(open_source(checkpoint).config) if each.row.quantized]
    kinds = ("int4-g64", "int8", "unquantized", "fp8", "int4-g32-zp")
    formats = {name: kinds[place % 5] for place, name in enumerate(names)}
    fields = {"calibrate": (text,), "moments": tmp_path / "m", "method": "awq"}
    outs = [shard(checkpoint, tmp_path / f"out{chips}", chips, formats, **fields) for chips in (1, 3)]
    for name in names:
        one, three = (Shards(out).dequantized(name, 0, 128) for out in outs)
        assert torch.equal(one, three)
    assert divergence(checkpoint, outs[0], list(range(100))) < 0.1


def test_nothing_to_scale(tmp_path: Path) -> None:
    """A mixture may quantize only where inputs can't be scaled."""
    checkpoint, text = make_inputs(tmp_path)
    names = [each.name for each in parameters(open_source(checkpoint).config) if each.row.quantized]
    formats = {name: "int4-g64" if name.endswith("o_proj.weight") else "unquantized" for name in names}
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="finds nothing to scale"):
        shard(checkpoint, tmp_path / "out", 1, formats, calibrate=(text,), moments=tmp_path / "m", method="awq")
    assert snapshot(tmp_path) == before
