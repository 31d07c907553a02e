"""Shards made with --calibrate: alike on any number of chips, made at once or one by one, and what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calibrated import TOKENS, content, make_inputs, values, write_text
from invoke import invoke, notes, refuse
from models import assert_same_bits, edit_json

from quantize.cli import command as quantize
from quantize.shards.reading import Shards

METHODS = ("scale", "gptq", "awq")
FORMATS = {
    "int4": ("--int4", "--group-size", 64),
    "int4-zp": ("--int4", "--group-size", 32, "--zero-points"),
    "int8": ("--int8",),
}


class Made:
    """A model, and shards of it, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoint, self.text = make_inputs(root)

    def options(self, method: str, form: str = "int4") -> tuple[object, ...]:
        kept = ("--moments", self.root / "moments") if method != "gptq" else ()
        return self.checkpoint, *FORMATS[form], "--calibrate", self.text, "--method", method, *kept

    def shards(self, method: str, chips: int = 1, form: str = "int4") -> Path:
        out = self.root / f"{method}-{form}-{chips}"
        if not out.exists():
            invoke(quantize, *self.options(method, form), "--chips", chips, "--out", out)
        return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("calibrated"))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_chips(made: Made, method: str, form: str) -> None:
    """Groups lie on two chips, heads are repeated and added; the report is the same to the bit."""
    expected = made.shards(method, 1, form)
    for chips in (2, 3):
        found = made.shards(method, chips, form)
        assert_same_bits(values(found), values(expected))
        assert content(found)["quantization_report.json"] == content(expected)["quantization_report.json"]


@pytest.mark.parametrize("method", METHODS)
def test_chip_by_chip(made: Made, method: str, tmp_path: Path) -> None:
    """In any order and into one directory: the files of a run for all chips."""
    for chip in (2, 0, 1):
        invoke(quantize, *made.options(method), "--chips", 3, "--only-chip", chip, "--out", tmp_path / "out")
    assert content(tmp_path / "out") == content(made.shards(method, 3))


@pytest.mark.parametrize("method", METHODS)
def test_resharded(made: Made, method: str, tmp_path: Path) -> None:
    """With or without the options, the files that quantizing for as many chips gives; method and text are kept."""
    for number, options in enumerate(((), (*FORMATS["int4"], "--method", method), FORMATS["int4"])):
        out = tmp_path / str(number)
        invoke(quantize, made.shards(method, 2), *options, "--chips", 3, "--out", out)
        assert content(out) == content(made.shards(method, 3))
    other = next(each for each in ("gptq", "awq") if each != method)
    says = ["can only be re-sharded", "--int4 --group-size 64" + (f" --method {method}" if method != "scale" else "")]
    options = (*FORMATS["int4"], "--method", other, "--out", tmp_path / "new")
    refuse(tmp_path, quantize, made.shards(method, 2), *options, says=says)


@pytest.mark.parametrize("method", METHODS)
def test_what_shards_say(made: Made, method: str) -> None:
    said = json.loads((made.shards(method) / "shards.json").read_text())
    assert said["method"] == method
    assert said["calibration"].keys() == {"tokens", "sha256"}
    assert said["calibration"]["tokens"] == TOKENS // 512 * 512
    manifest = Shards(made.shards(method)).manifest
    assert (manifest.method, manifest.calibration) == (method, said["calibration"])
    report = json.loads((made.shards(method) / "quantization_report.json").read_text())
    assert all(0 < each["output_error"] < 0.2 for each in report["tensors"].values())
    assert len(report["tensors"]) == 4 * 7


def test_methods_differ(made: Made) -> None:
    """None is another under its name, and each looks at the inputs."""
    invoke(quantize, made.checkpoint, *FORMATS["int4"], "--out", made.root / "plain")
    name = "model.layers.2.mlp.down_proj.weight_packed"
    held = [values(made.root / "plain")[name], *(values(made.shards(method))[name] for method in METHODS)]
    assert all((one != other).any() for i, one in enumerate(held) for other in held[:i])


def output_errors(out: Path) -> float:
    report = json.loads((out / "quantization_report.json").read_text())
    return sum(each["output_error"] for each in report["tensors"].values())


def test_the_outputs_errors_fall(made: Made) -> None:
    """By the report: error feedback's are of the inputs themselves, the others of their mean squares."""
    assert output_errors(made.shards("gptq")) < 0.9 * output_errors(made.shards("scale"))


def test_a_second_format_takes_the_moments(made: Made, tmp_path: Path) -> None:
    options = ("--calibrate", made.text, "--moments", tmp_path / "moments")
    first = invoke(quantize, made.checkpoint, *FORMATS["int4"], *options, "--out", tmp_path / "a")
    kept = content(tmp_path / "moments")
    second = invoke(quantize, made.checkpoint, *FORMATS["int8"], *options, "--out", tmp_path / "b")
    assert not any("moments" in line for line in notes(first))
    assert [line for line in notes(second) if "moments" in line and "it is taken" in line]
    assert content(tmp_path / "moments") == kept
    assert kept.keys() == {"moments.safetensors"}


def test_where_moments_are_kept(made: Made, tmp_path: Path) -> None:
    """Beside --out, under the checkpoint's name, unless a directory is given."""
    invoke(quantize, made.checkpoint, *FORMATS["int8"], "--calibrate", made.text, "--out", tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "hf-moments"}


@pytest.mark.parametrize("change", ["text", "count", "layers", "model"])
def test_moments_of_something_else(made: Made, change: str, tmp_path: Path) -> None:
    """They are refused and stay as they are."""
    moments = ("--moments", tmp_path / "moments")
    start = (made.checkpoint, "--int8")
    invoke(quantize, *start, "--calibrate", made.text, *moments, "--out", tmp_path / "a")
    text, more = made.text, []
    if change == "text":
        text = write_text(tmp_path / "other.json", seed=1)
    elif change == "count":
        more = ["--calibration-tokens", 100]
    elif change == "layers":
        more = ["--layers", 2]
    else:
        (tmp_path / "other").mkdir()
        start = (make_inputs(tmp_path / "other")[0], "--int8")
    arguments = (*start, "--calibrate", text, *moments, *more, "--out", tmp_path / "b")
    refuse(tmp_path, quantize, *arguments, says=[str(tmp_path / "moments"), "--moments"])


def test_finished_is_found_finished(made: Made) -> None:
    for method in METHODS:
        out = made.shards(method)
        before = content(out)
        assert "already complete" in invoke(quantize, *made.options(method), "--out", out).stdout
        assert content(out) == before
        refuse(made.root, quantize, made.checkpoint, *FORMATS["int4"], "--out", out, says=["calibration", "--force"])
        (out / ".written.json").unlink()  # then shards.json is asked
        assert "already complete" in invoke(quantize, *made.options(method), "--out", out).stdout


def test_bf16_has_no_method(made: Made, tmp_path: Path) -> None:
    options = ("--bf16", "--calibrate", made.text)
    refuse(
        tmp_path,
        quantize,
        made.checkpoint,
        *options,
        "--out",
        tmp_path / "a",
        says=["Nothing is to be quantized", "--calibrate"],
    )


@pytest.mark.parametrize(
    "change",
    [
        {"method": "best"},
        {"method": 3},
        {"method": None},
        {"calibration": 7},
        {"calibration": {}},
        {"calibration": {"tokens": "512", "sha256": "0" * 64}},
        {"calibration": {"tokens": True, "sha256": "0" * 64}},
        {"calibration": {"tokens": 0, "sha256": "0" * 64}},
        {"calibration": {"tokens": 512, "sha256": "xyz"}},
        {"calibration": {"tokens": 512, "sha256": "0" * 64, "more": 1}},
        {"calibration": None},
        {"method": "rtn"},
    ],
    ids=str,
)
def test_damaged_entries(made: Made, change: dict[str, Any], tmp_path: Path) -> None:
    """What no run writes is refused, by every reader."""
    invoke(quantize, made.shards("gptq"), "--chips", 2, "--out", tmp_path / "out")
    edit_json(tmp_path / "out" / "shards.json", lambda content: content.update(change))
    refuse(tmp_path, quantize, "--verify", "--out", tmp_path / "out", says=["shards.json is damaged"])
    refuse(tmp_path, quantize, tmp_path / "out", "--chips", 1, "--out", tmp_path / "new", says=["damaged"])
