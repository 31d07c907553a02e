"""llama-eval's figures against float64 computations from transformers' logits, for models of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import virtual_chips
from divergence import expected, expected_against
from invoke import invoke
from models import make_model, make_opt
from parity import reference
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters.cli import command as convert
from quantize.cli import command as quantize
from runtime.evaluate.evaluate import evaluate
from runtime.evaluate.report import Evaluation

WINDOW, TOKENS = 48, 3 * 48 + 19  # the windows don't divide the text
MODELS: dict[str, tuple[Callable[..., PreTrainedModel], dict[str, Any]]] = {
    "grouped": (make_model, {"heads": 6, "kv_heads": 2, "hidden": 48, "head_dim": 16, "ffn": 172, "vocab": 515}),
    "tied": (make_model, {"heads": 5, "hidden": 40, "ffn": 96, "vocab": 131, "tied": True}),
    "opt": (make_opt, {"heads": 4, "hidden": 48, "ffn": 70, "vocab": 211, "width": 37, "do_layer_norm_before": False}),
}


class Case(NamedTuple):
    """A converted model, a text, and transformers' models: as it is, and with what int8 makes of the weights."""

    checkpoint: Path
    tokens: list[int]
    whole: PreTrainedModel
    int8: PreTrainedModel


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    made = {}
    for name, (make, sizes) in MODELS.items():
        root = tmp_path_factory.mktemp(name)
        make(root / "hf", **sizes)
        invoke(convert, "--source", root / "hf", "--out", root / "checkpoint", "--dtype", "float32")
        invoke(quantize, root / "checkpoint", "--int8", "--out", root / "int8")
        whole = AutoModelForCausalLM.from_pretrained(root / "checkpoint", dtype=torch.float32).eval()
        tokens = torch.randint(3, sizes["vocab"], (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
        made[name] = Case(root / "checkpoint", tokens, whole, reference(root / "checkpoint", root / "int8"))
    return made


def evaluated(*args: Any, **options: Any) -> Evaluation:
    """In this process, on virtual chips where it is XLA's."""
    options = {"backend": "eager", "window": WINDOW} | options
    if options["backend"] == "xla":
        virtual_chips.start()
    with virtual_chips.quickly_compiled() if options["backend"] == "xla" else nullcontext():
        found = evaluate(*args, **options)
    assert found is not None
    assert found.recompilations == 0
    return found


@pytest.mark.parametrize(("backend", "chips"), [("eager", 1), ("xla", 1), ("xla", 4)])
def test_perplexity_is_that_of_transformers(cases: dict[str, Case], backend: str, chips: int, tmp_path: Path) -> None:
    case = cases["grouped"]
    invoke(quantize, case.checkpoint, "--int8", "--chips", chips, "--out", tmp_path / "out")
    found = evaluated(tmp_path / "out", case.tokens, backend=backend)
    value, stderr = expected(case.int8, case.tokens, WINDOW)
    assert found.perplexity.value == pytest.approx(value, rel=1e-4)
    assert found.perplexity.stderr == pytest.approx(stderr, rel=1e-4)
    assert (found.tokens, found.windows, len(found.positions)) == (TOKENS, 4, TOKENS - 4)
    assert found.chips == chips
    assert found.divergence is None


@pytest.mark.parametrize(
    ("model", "backend", "chips"),
    [
        *((model, "eager", 1) for model in MODELS),
        ("grouped", "xla", 4),
        pytest.param("tied", "xla", 3, marks=pytest.mark.slow),
        pytest.param("opt", "xla", 3, marks=pytest.mark.slow),
        pytest.param("grouped", "inductor", 1, marks=pytest.mark.slow),
    ],
)
def test_the_divergence_from_the_checkpoint(
    cases: dict[str, Case], model: str, backend: str, chips: int, tmp_path: Path
) -> None:
    """Whose values are split for the chips as they are read."""
    case = cases[model]
    invoke(quantize, case.checkpoint, "--int8", "--chips", chips, "--out", tmp_path / "out")
    found = evaluated(tmp_path / "out", case.tokens, against=case.checkpoint, backend=backend)
    check(found, case.int8, case.whole, case.tokens)


def check(found: Evaluation, model: PreTrainedModel, reference: PreTrainedModel, tokens: list[int]) -> None:
    value, stderr = expected(model, tokens, found.window)
    ours = found.to_json()
    assert ours["perplexity"] == pytest.approx(value, rel=1e-4)
    assert ours["perplexity_stderr"] == pytest.approx(stderr, rel=1e-3)
    wanted = expected_against(model, reference, tokens, found.window)
    assert wanted["kl_mean"] > 1e-5
    assert 0 < wanted["same_first"] < 1
    assert {name: ours["against"][name] for name in wanted} == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("backend", "chips"), [("eager", 1), ("xla", 2)])
def test_windows_of_several_pieces(cases: dict[str, Case], backend: str, chips: int, tmp_path: Path) -> None:
    """Longer than the largest bucket: later pieces attend to those before them, in windows of any length."""
    case = cases["grouped"]
    tokens = torch.randint(3, 515, (1350,), generator=torch.Generator().manual_seed(2)).tolist()
    invoke(quantize, case.checkpoint, "--int8", "--chips", chips, "--out", tmp_path / "out")
    found = evaluated(tmp_path / "out", tokens, against=case.checkpoint, backend=backend, window=600)
    assert found.windows == 3
    check(found, case.int8, case.whole, tokens)


@pytest.mark.parametrize("other", ["--bf16", "--int4"])
def test_the_divergence_from_other_shards(cases: dict[str, Case], other: str, tmp_path: Path) -> None:
    case = cases["tied"]
    flags = (other, "--group-size", "channel") if other == "--int4" else (other,)
    invoke(quantize, case.checkpoint, "--int8", "--out", tmp_path / "int8")
    invoke(quantize, case.checkpoint, *flags, "--out", tmp_path / "other")
    theirs = reference(case.checkpoint, tmp_path / "other")
    if other == "--bf16":
        for parameter in theirs.parameters():
            parameter.data = parameter.data.bfloat16().float()
    found = evaluated(tmp_path / "int8", case.tokens, against=tmp_path / "other")
    check(found, case.int8, theirs, case.tokens)
    assert found.against_weights == other.removeprefix("--")


def test_a_model_does_not_diverge_from_itself(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["grouped"]
    invoke(quantize, case.checkpoint, "--int8", "--out", tmp_path / "out")
    found = evaluated(tmp_path / "out", case.tokens, against=tmp_path / "out").divergence
    assert (found.ratio.value, found.ratio.stderr, found.kl.value, found.kl_max) == (1, 0, 0, 0)
    assert (found.same_first, found.delta_p_rms) == (1, 0)


@pytest.mark.parametrize(("backend", "chips"), [("eager", 1), ("xla", 3)])
def test_every_number_of_layers(cases: dict[str, Case], backend: str, chips: int, tmp_path: Path) -> None:
    """Both models cut after one layer, as transformers' are."""
    case = cases["opt"]
    invoke(quantize, case.checkpoint, "--int8", "--chips", chips, "--out", tmp_path / "out")
    options = {"against": case.checkpoint, "backend": backend}
    found = evaluated(tmp_path / "out", case.tokens, by_layer=True, **options)
    wanted = [_cut_divergence(case, layers) for layers in (1, 2)]
    assert found.by_layer == pytest.approx(wanted, rel=1e-3)
    assert found.by_layer[-1] == found.divergence.kl.value
    cut = evaluated(tmp_path / "out", case.tokens, layers=1, **options)
    assert cut.divergence.kl.value == pytest.approx(wanted[0], rel=1e-3)
    assert wanted[0] != pytest.approx(wanted[1], rel=0.1)


def _cut_divergence(case: Case, layers: int) -> float:
    decoders = [model.model.decoder for model in (case.int8, case.whole)]
    whole = [decoder.layers for decoder in decoders]
    for decoder, each in zip(decoders, whole, strict=True):
        decoder.layers = each[:layers]
    found = expected_against(case.int8, case.whole, case.tokens, WINDOW)
    for decoder, each in zip(decoders, whole, strict=True):
        decoder.layers = each
    return found["kl_mean"]


def test_models_of_different_depth(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["grouped"]
    invoke(quantize, case.checkpoint, "--int8", "--layers", 1, "--out", tmp_path / "out")
    found = evaluated(tmp_path / "out", case.tokens, against=case.checkpoint)
    theirs, _ = expected(case.whole, case.tokens, WINDOW)
    assert found.divergence.reference_perplexity.value == pytest.approx(theirs, rel=1e-4)
    assert found.divergence.kl.value > 0.1


@pytest.mark.parametrize("options", [{"activations": "int8"}, {"kv_cache_dtype": torch.int8}], ids=str)
@pytest.mark.parametrize("backend", ["eager", "xla"])
def test_what_is_rounded_beside_the_weights_is_so_in_the_model_alone(
    cases: dict[str, Case], options: dict[str, Any], backend: str, tmp_path: Path
) -> None:
    """The reference's head is quantized too, and takes its input as it is."""
    case = cases["grouped"]
    invoke(quantize, case.checkpoint, "--int8", "--quantize-lm-head", "--out", tmp_path / "out")
    model = reference(case.checkpoint, tmp_path / "out")
    found = evaluated(tmp_path / "out", case.tokens, against=tmp_path / "out", backend=backend, **options)
    exact, _ = expected(model, case.tokens, WINDOW)
    assert found.divergence.reference_perplexity.value == pytest.approx(exact, rel=1e-5)
    assert found.divergence.kl.value > 1e-5


def test_bfloat16_is_near(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["grouped"]
    invoke(quantize, case.checkpoint, "--bf16", "--out", tmp_path / "out")
    found = evaluated(tmp_path / "out", case.tokens, against=tmp_path / "out", dtype=torch.bfloat16)
    exact, _ = expected(case.whole, case.tokens, WINDOW)
    assert found.dtype == found.kv_cache_dtype == "bfloat16"
    assert found.perplexity.value == pytest.approx(exact, rel=0.05)
    assert found.divergence.kl.value == 0


def test_a_compile_cache_has_all_graphs_of_a_second_run(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["tied"]
    invoke(quantize, case.checkpoint, "--int8", "--chips", 2, "--out", tmp_path / "out")
    options = {"against": case.checkpoint, "backend": "xla", "compile_cache": tmp_path / "cache"}
    virtual_chips.start()
    with virtual_chips.graphs_given_to_xla() as given:
        first = evaluated(tmp_path / "out", case.tokens, **options)
        compiled = len(given)
        second = evaluated(tmp_path / "out", case.tokens, **options)
    assert first.to_json() | {"seconds": 0} == second.to_json() | {"seconds": 0}
    assert 0 < compiled == len(given)
