"""llama-eval's input, its table, JSON and picture; what it refuses, in one line and before the device."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from divergence import expected, expected_against
from invoke import invoke, invoke_error, notes
from models import make_model, make_opt
from parity import reference
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from converters.cli import command as convert
from quantize.cli import command as quantize
from runtime.eval_cli import command as evaluate
from runtime.evaluate import evaluate as module
from runtime.evaluate import passes
from runtime.evaluate.plot import by_place, draw
from runtime.evaluate.report import Evaluation
from runtime.evaluate.statistics import Positions

VOCAB = 131
WORDS = [f"w{number}" for number in range(VOCAB)]
IDS = torch.randint(0, VOCAB, (150,), generator=torch.Generator().manual_seed(0)).tolist()
KEYS = ["model", "weights", "tokens", "windows", "window", "predictions", "perplexity", "perplexity_stderr"]
MORE_KEYS = ["dtype", "kv_cache_dtype", "activations", "platform", "chips", "recompilations", "seconds"]
AGAINST_KEYS = ["model", "weights", "perplexity", "perplexity_stderr", "ratio", "ratio_stderr", "kl_mean", "kl_stderr"]
AGAINST_KEYS += ["kl_median", "kl_p99", "kl_p999", "kl_max", "same_first", "delta_p_rms"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer that knows words alone, its shards, and texts."""
    root = tmp_path_factory.mktemp("cli")
    make_model(root / "hf", vocab=VOCAB)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(root / "hf" / "tokenizer.json"))
    invoke(convert, "--source", root / "hf", "--out", root / "checkpoint", "--dtype", "float32")
    invoke(quantize, root / "checkpoint", "--int8", "--out", root / "int8")
    invoke(quantize, root / "checkpoint", "--fp8", "--chips", 2, "--out", root / "fp8")
    make_model(root / "other", vocab=VOCAB + 1)
    make_opt(root / "opt", vocab=VOCAB, positions=64)
    for name in ("other", "opt"):
        invoke(quantize, root / name, "--int8", "--out", root / f"{name}-int8")
    (root / "ids.json").write_text(json.dumps(IDS))
    np.save(root / "ids.npy", np.array(IDS, dtype=np.int32))
    (root / "words.txt").write_text(" ".join(WORDS[i] for i in IDS))
    return root


def run(folder: Path, *args: object, text: str = "ids.json") -> dict[str, Any]:
    options = ("--shards", folder / "int8", "--text", folder / text, "--backend", "eager", "--window", 64)
    return json.loads(invoke(evaluate, *options, *args, "--json", "-").stdout)


@pytest.mark.parametrize("text", ["ids.json", "ids.npy", "words.txt"])
def test_texts_of_every_kind(folder: Path, text: str) -> None:
    found = run(folder, text=text)
    model = reference(folder / "checkpoint", folder / "int8")
    assert list(found) == KEYS + MORE_KEYS
    assert (found["tokens"], found["windows"], found["predictions"]) == (150, 3, 147)
    assert (found["perplexity"], found["perplexity_stderr"]) == pytest.approx(expected(model, IDS, 64), rel=1e-4)


def test_texts_follow_each_other(folder: Path) -> None:
    twice = run(folder, "--text", folder / "words.txt", "--tokens", 200)
    model = reference(folder / "checkpoint", folder / "int8")
    assert twice["tokens"] == 200
    assert twice["perplexity"] == pytest.approx(expected(model, (IDS + IDS)[:200], 64)[0], rel=1e-4)


def test_the_table_and_the_json_say_the_same(folder: Path, tmp_path: Path) -> None:
    arguments = ("--shards", folder / "int8", "--text", folder / "ids.json", "--backend", "eager", "--window", 64)
    more = ("--against", folder / "checkpoint", "--tokens", 130, "--by-layer", "--json", tmp_path / "out.json")
    result = invoke(evaluate, *arguments, *more)
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == [*KEYS, "against", "by_layer", *MORE_KEYS]
    assert list(found["against"]) == AGAINST_KEYS
    whole = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32).eval()
    wanted = expected_against(reference(folder / "checkpoint", folder / "int8"), whole, IDS[:130], 64)
    assert {name: found["against"][name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    against = found["against"]
    for label, value in (
        ("perplexity", f"{found['perplexity']:.4f} +- {found['perplexity_stderr']:.4f}"),
        ("text", "130 tokens in 3 windows of 64, 127 predictions"),
        ("ratio of perplexities", f"{against['ratio']:.5f} +- {against['ratio_stderr']:.5f}"),
        ("mean KL", f"{against['kl_mean']:.6f} +- {against['kl_stderr']:.6f} nats per token"),
        ("same first token", f"{against['same_first']:.2%} of positions"),
        ("mean KL after 2 layers", f"{found['by_layer'][1]:.6f}"),
    ):
        assert re.search(rf"^{re.escape(label)} +{re.escape(value)}$", result.stdout, re.MULTILINE), label
    assert not any("of --tokens" in each for each in notes(result))


def test_fewer_tokens_than_asked_for_are_said(folder: Path) -> None:
    arguments = ("--shards", folder / "int8", "--backend", "eager", "--text", folder / "ids.json")
    assert "The text holds 150 tokens, fewer than the 8192 of --tokens: all are taken." in notes(
        invoke(evaluate, *arguments)
    )
    said = notes(invoke(evaluate, *arguments, "--text", folder / "words.txt", "--tokens", 150))
    assert f"{folder / 'words.txt'} is not reached: the files before it hold the 150 tokens of --tokens." in said


def test_the_picture(folder: Path, tmp_path: Path) -> None:
    run(folder, "--against", folder / "checkpoint", "--by-layer", "--plot", tmp_path / "a.png")
    run(folder, "--against", folder / "checkpoint", "--plot", tmp_path / "b.png")
    sizes = [Image.open(tmp_path / name).size for name in ("a.png", "b.png")]
    assert sizes == [(1800, 750), (1200, 750)]


def test_the_picture_has_every_position_once() -> None:
    place = np.concatenate([np.arange(1, 200), np.arange(1, 50)])
    kl = np.random.default_rng(0).gamma(2.0, 1.0, len(place))
    positions = Positions(place, -kl, -kl, kl, kl)
    bins = by_place(positions)
    assert bins[0, 0] == 1
    assert bins[-1, 1] == 199
    assert (bins[1:, 0] == bins[:-1, 1] + 1).all()
    counts = [((place >= first) & (place <= last)).sum() for first, last in bins[:, :2]]
    assert np.average(bins[:, 2], weights=counts) == pytest.approx(kl.mean())
    assert by_place(Positions(np.array([1, 2]), kl, kl, kl[:2], kl)).shape == (2, 4)


NO_TEXT = "Give --text: text that the model was not calibrated on, of the kind that it will be used for, of 8,192"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), NO_TEXT),
        (("--text", "ids.md"), "give text as .txt, or token ids as .json (a list) or .npy"),
        (("--text", "none.txt"), "none.txt is no file"),
        (("--text", "object.json"), "holds {'ids': [1]}; give a list"),
        (("--text", "fraction.json"), "holds 2.0 in its list"),
        (("--text", "true.json"), "holds True in its list"),
        (("--text", "broken.json"), "is no JSON"),
        (("--text", "beyond.json"), "holds the token 131, and the model's are 0 to 130"),
        (("--text", "negative.json"), "holds the token -1, and"),
        (("--text", "one.json"), "holds 1 of the 2 tokens"),
        (("--text", "empty.txt"), "holds 0 of the 2 tokens"),
        (("--text", "latin.txt"), "latin.txt is not UTF-8"),
        (("--text", "square.npy"), "holds int64 [3, 3]; give token ids"),
        (("--text", "floats.npy"), "holds float64 [3]; give token ids"),
        (("--text", "broken.npy"), "is no file that numpy.save wrote"),
        (("--text", "ids.json", "--tokens", 1), "holds 1 of the 2 tokens"),
        (("--text", "ids.json", "--window", 1), "--window"),
        (("--text", "ids.json", "--layers", 3), "give 1 to 2"),
        (("--text", "ids.json", "--by-layer"), "--by-layer compares two models: give --against"),
        (("--text", "ids.json", "--plot", "a.png"), "--plot draws the divergence from another model: give --against"),
        (("--text", "ids.json", "--plot", "a.pdf", "--against", "int8"), "give a name that ends in .png"),
        (("--text", "ids.json", "--plot", "none/a.png", "--against", "int8"), "can't be written"),
        (("--text", "ids.json", "--json", "none/a.json"), "can't be written"),
        (("--text", "ids.json", "--compile-cache", "cache", "--backend", "eager"), "leave out --compile-cache"),
        (("--text", "ids.json", "--against", "none"), "none does not exist"),
        (("--text", "ids.json", "--against", "other-int8"), "has a vocabulary of 132 and"),
        (("--text", "ids.json", "--against", "other"), "has a vocabulary of 132 and"),
        (("--text", "ids.json", "--against", "fp8"), "is for 2 chips and"),
        (("--text", "ids.json", "--against", "fp8"), "--fp8 --chips 1 --out OTHER"),
        (("--text", "ids.json", "--against", "renamed"), "have different files tokenizer.json"),
        (("--text", "ids.json", "--against", "opt", "--window", 65), "has learned 64 positions, and --window is 65"),
        (("--text", "ids.json", "--against", "shallow", "--by-layer", "--window", 64), "Give --layers 1"),
        (("--text", "words.txt", "--shards", "opt-int8"), "has no tokenizer.json to read"),
        (("--text", "ids.json", "--shards", "opt-int8", "--window", 65), "--window is 65. Give 64 or less"),
        (("--text", "ids.json", "--shards", "fp8", "--activations", "int8"), "Activations in int8 are for"),
        (("--text", "ids.json", "--shards", "checkpoint"), "no finished output of llama-quantize"),
    ],
    ids=str,
)
def test_what_is_refused(
    arguments: tuple[object, ...], says: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_device(*_: object) -> None:
        raise AssertionError("the device was brought up")

    monkeypatch.setattr(passes, "start_backend", no_device)
    monkeypatch.chdir(tmp_path)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    files = {"ids.md": "", "empty.txt": "", "object.json": '{"ids": [1]}', "fraction.json": "[1, 2.0]"}
    files |= {"true.json": "[true]", "broken.json": "[1, ", "beyond.json": "[3, 131]", "negative.json": "[3, -1]"}
    files |= {"one.json": "[5]", "broken.npy": "no array"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    np.save(tmp_path / "square.npy", np.ones((3, 3), dtype=np.int64))
    np.save(tmp_path / "floats.npy", np.ones(3))
    if "renamed" in arguments:
        shutil.copytree(folder / "checkpoint", tmp_path / "renamed")
        text = (tmp_path / "renamed" / "tokenizer.json").read_text()
        (tmp_path / "renamed" / "tokenizer.json").write_text(text.replace('"w7"', '"v7"'))
    if "shallow" in arguments:
        invoke(quantize, folder / "checkpoint", "--int8", "--layers", 1, "--out", tmp_path / "shallow")
    shards = () if "--shards" in arguments else ("--shards", "int8")
    assert says in invoke_error(evaluate, *shards, *arguments)


@pytest.mark.parametrize(
    ("weight", "says"), [(torch.nan, "147 of 147 predictions are no numbers"), (1e6, "less than exp(-700) on average")]
)
def test_predictions_that_are_good_for_nothing(weight: float, says: str, folder: Path, tmp_path: Path) -> None:
    """What only the device finds, after notes and progress."""
    make_model(tmp_path / "hf", vocab=VOCAB)
    tensors = load_file(tmp_path / "hf" / "model.safetensors") | {"model.norm.weight": torch.full((48,), weight)}
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    options = ("--shards", folder / "int8", "--text", folder / "ids.json", "--backend", "eager", "--window", 64)
    line = invoke(evaluate, *options, "--against", tmp_path / "hf", exit_code=2).stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert says in line


def test_a_recompilation_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.evaluate_model

    def recompiled(*args: Any) -> Evaluation:
        return replace(real(*args), recompilations=2)

    monkeypatch.setattr(module, "evaluate_model", recompiled)
    arguments = ("--shards", folder / "int8", "--text", folder / "ids.json", "--backend", "eager")
    assert "Error: 2 graphs compiled after warm-up" in invoke(evaluate, *arguments, exit_code=1).stderr


def test_outputs_without_room_on_this_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "available_memory", lambda: 10_000)
    options = ("--shards", folder / "int8", "--text", folder / "ids.json", "--backend", "eager", "--window", 64)
    line = invoke_error(evaluate, *options, "--against", folder / "checkpoint", "--by-layer")
    assert "The reference's outputs of 2 layers take 73.73 kB of this host's memory, where 10.00 kB are free" in line
    assert "Give fewer --tokens, or leave out --by-layer." in line


def test_the_picture_of_no_divergence(folder: Path) -> None:
    found = module.evaluate(folder / "int8", IDS, against=folder / "int8", backend="eager", window=64)
    assert found.divergence.kl_max == 0
    assert Image.open(io.BytesIO(draw(found))).format == "PNG"
