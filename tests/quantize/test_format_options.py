"""--int4, --group-size, --zero-points and --method: what is taken by default, noted, refused, and resumed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from invoke import Killed, invoke, invoke_error, kill_at, notes, refuse
from models import SMALL, write_hf

from converters.model.config import ModelConfig
from converters.output import journal
from converters.output.journal import Journal
from quantize.cli import command as quantize

SIZES = replace(SMALL, num_layers=1, vocab_size=51)
WIDE = replace(SIZES, hidden_size=128, intermediate_size=384, head_dim=32)
DOWN, OUT, QUERY = "mlp.down_proj.weight", "self_attn.o_proj.weight", "self_attn.q_proj.weight"


def of_widths(hidden: int, attention: int, ffn: int) -> ModelConfig:
    """A model whose weights have so many inputs."""
    return replace(SIZES, hidden_size=hidden, head_dim=attention // SIZES.num_heads, intermediate_size=ffn)


def said(result_stdout: str) -> str:
    """What the first line says the weights are: "int4 in groups of 64"."""
    return result_stdout.splitlines()[0].split(", ", 2)[2].rsplit(", ", 3)[0]


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", config=WIDE)


def files(directory: Path) -> dict[str, str]:
    """By name, but for the record of the run."""
    paths = (path for path in directory.iterdir() if path.name != ".written.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# --- sizes of groups


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(
    ("widths", "groups", "note"),
    [
        ((128, 256, 384), " in groups of 128", None),
        ((64, 128, 128), " in groups of 64", f"{QUERY} has 64 inputs, no multiple of 128: groups of 64 are taken."),
        ((128, 192, 256), " in groups of 64", f"{OUT} has 192 inputs, no multiple of 128: groups of 64 are taken."),
        ((128, 64, 96), " in groups of 32", f"{DOWN} has 96 inputs, no multiple of 64: groups of 32 are taken."),
        ((32, 128, 128), " in groups of 32", f"{QUERY} has 32 inputs, no multiple of 64: groups of 32 are taken."),
        ((128, 128, 172), "", f"{DOWN} has 172 inputs, no multiple of 32: one scale per output channel is taken."),
        ((48, 128, 128), "", f"{QUERY} has 48 inputs, no multiple of 32: one scale per output channel is taken."),
    ],
    ids=str,
)
def test_int4_takes_the_largest_groups_that_divide_the_widths(
    widths: tuple[int, int, int], groups: str, note: str | None, zero_points: bool, tmp_path: Path
) -> None:
    write_hf(tmp_path / "hf", config=of_widths(*widths))
    flags = ["--int4", *(["--zero-points"] if zero_points else [])]
    for options in (["--dry-run"], []):
        result = invoke(quantize, tmp_path / "hf", *flags, "--out", tmp_path / "out", *options)
        assert said(result.stdout) == f"int4{groups}" + (", zero points" if zero_points else "")
        assert notes(result) == ([f"model.layers.0.{note}"] if note else [])
    manifest = json.loads((tmp_path / "out" / "shards.json").read_text())
    size = int(groups.split()[-1]) if groups else None
    assert (manifest["group_size"], manifest["zero_points"]) == (size, zero_points)
    # The same where it is asked for, and then there is nothing to note.
    asked = invoke(quantize, tmp_path / "hf", *flags, "--group-size", size or "channel", "--out", tmp_path / "asked")
    assert notes(asked) == []
    assert files(tmp_path / "asked") == files(tmp_path / "out")


def test_a_quantized_lm_head_is_in_the_same_groups(wide: Path, tmp_path: Path) -> None:
    assert notes(invoke(quantize, wide, "--int4", "--quantize-lm-head", "--out", tmp_path / "out")) == []
    tensors = json.loads((tmp_path / "out" / "shards.json").read_text())["tensors"]
    assert tensors["lm_head.weight_packed"] == {"shape": [51, 128], "dtype": "int4", "shard_axis": 0, "padding": 0}
    assert tensors["lm_head.weight_scale"]["shape"] == [51, 1]


@pytest.mark.parametrize("kind", ["--int8", "--fp8"])
def test_others_have_a_scale_per_channel_by_default(wide: Path, kind: str, tmp_path: Path) -> None:
    result = invoke(quantize, wide, kind, "--out", tmp_path / "out")
    assert notes(result) == []
    assert said(result.stdout) == kind.removeprefix("--")
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["group_size"] is None
    asked = invoke(quantize, wide, kind, "--group-size", "channel", "--out", tmp_path / "out")
    assert "already complete" in asked.stdout


@pytest.mark.parametrize("kind", ["--int4", "--int8", "--fp8"])
@pytest.mark.parametrize(
    ("widths", "size", "first", "suggested"),
    [
        ((128, 128, 192), 128, f"{DOWN} has 192 inputs", ["64", "32", "channel"]),
        ((64, 128, 96), 128, f"{QUERY} has 64 inputs", ["32", "channel"]),  # 64 would not do for down
        ((128, 128, 172), 32, f"{DOWN} has 172 inputs", ["channel"]),
        ((32, 128, 128), 64, f"{QUERY} has 32 inputs", ["32", "channel"]),
    ],
    ids=str,
)
def test_a_size_that_does_not_divide_is_refused(
    widths: tuple[int, int, int], size: int, first: str, suggested: list[str], kind: str, tmp_path: Path
) -> None:
    """One line that names the weight and what would do, and that does."""
    write_hf(tmp_path / "hf", config=of_widths(*widths))
    out = ("--out", tmp_path / "out")
    words = [f"model.layers.0.{first}, which is no multiple of {size}", f"--group-size {' or '.join(suggested)}."]
    refuse(tmp_path, quantize, tmp_path / "hf", kind, "--group-size", size, *out, says=words)
    for each in suggested:
        invoke(quantize, tmp_path / "hf", kind, "--group-size", each, *out, "--dry-run")


# --- what can't be combined


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--fp8", "--zero-points"], ["--fp8 can't be combined with --zero-points"]),
        (["--fp8", "--group-size", "64", "--zero-points"], ["--fp8 can't be combined with --zero-points"]),
        (["--bf16", "--zero-points"], ["--bf16 can't be combined with --zero-points"]),
        (["--bf16", "--group-size", "64"], ["--bf16 can't be combined with --group-size"]),
        (["--int8", "--int4"], ["--int8", "--int4", "not both"]),
        (["--fp8", "--bf16"], ["--fp8", "--bf16", "not both"]),
        (["--int4", "--int8", "--fp8"], ["not both"]),
        (["--int4", "--group-size", "16"], ["--group-size", "channel", "128"]),
        (["--int4", "--method", "best"], ["--method", "rtn"]),
        (["--group-size", "64"], ["--int8", "--int4", "--fp8", "--bf16"]),
        (["--zero-points", "--method", "rtn"], ["--int8", "--int4", "--fp8", "--bf16"]),
    ],
    ids=str,
)
def test_what_can_not_be_combined(wide: Path, flags: list[str], says: list[str], tmp_path: Path) -> None:
    refuse(tmp_path, quantize, wide, *flags, "--out", tmp_path / "out", says=says)


# --- shards for another number of chips


@pytest.mark.parametrize(
    ("made", "accepted"),
    [
        (
            ["--int4", "--group-size", "32", "--zero-points"],
            [
                ["--int4"],
                ["--int4", "--group-size", "32"],
                ["--int4", "--zero-points"],
                ["--int4", "--method", "scale"],
            ],
        ),
        (["--int4", "--method", "rtn"], [["--int4"], ["--int4", "--method", "rtn"]]),
        (["--int8", "--method", "rtn"], [["--int8"], ["--int8", "--method", "rtn"], ["--int8", "--method", "scale"]]),
        (["--fp8", "--group-size", "64"], [["--fp8"], ["--fp8", "--method", "rtn"]]),
        (["--bf16", "--method", "rtn"], [["--bf16"], ["--bf16", "--method", "rtn"]]),
    ],
    ids=str,
)
def test_resharding_with_the_same_flags_or_fewer(
    wide: Path, made: list[str], accepted: list[list[str]], tmp_path: Path
) -> None:
    """All give the files that quantizing for so many chips gives."""
    invoke(quantize, wide, *made, "--chips", 3, "--out", tmp_path / "three")
    invoke(quantize, wide, *made, "--chips", 2, "--out", tmp_path / "two")
    for number, flags in enumerate([made, *accepted]):
        out = tmp_path / f"two-{number}"
        assert notes(invoke(quantize, tmp_path / "three", *flags, "--chips", 2, "--out", out)) == []
        assert files(out) == files(tmp_path / "two")


@pytest.mark.parametrize(
    ("made", "refused"),
    [
        (
            ["--int4", "--group-size", "32", "--zero-points"],
            [
                ["--int8"], ["--fp8"], ["--bf16"], ["--int4", "--group-size", "64"], ["--int4", "--method", "rtn"],
                ["--int4", "--group-size", "channel"], ["--int4", "--quantize-lm-head"],
            ],
        ),
        (["--int4", "--group-size", "128"], [["--int4", "--zero-points"], ["--int4", "--group-size", "64"]]),
        (["--int4", "--group-size", "channel"], [["--int4", "--group-size", "128"], ["--int8"]]),
        (["--int8"], [["--int8", "--group-size", "64"], ["--int8", "--zero-points"], ["--int4"]]),
        (["--int8", "--quantize-lm-head"], [["--int8"], ["--bf16"]]),
        (["--fp8", "--group-size", "64"], [["--fp8", "--group-size", "channel"], ["--int8", "--group-size", "64"]]),
        (["--bf16"], [["--int8"], ["--fp8"]]),
    ],
    ids=str,
)  # fmt: skip
def test_resharding_with_other_flags_is_refused(
    wide: Path, made: list[str], refused: list[list[str]], tmp_path: Path
) -> None:
    """One line, which says the flags that would do."""
    invoke(quantize, wide, *made, "--chips", 2, "--out", tmp_path / "two")
    says = [f"holds shards made with {' '.join(made)}; they can only be re-sharded with the same"]
    for flags in refused:
        again = (tmp_path / "two", *flags, "--chips", 3, "--out", tmp_path / "three")
        refuse(tmp_path, quantize, *again, says=says)


def test_zero_points_can_not_be_asked_of_fp8_shards(wide: Path, tmp_path: Path) -> None:
    invoke(quantize, wide, "--fp8", "--out", tmp_path / "one")
    line = invoke_error(quantize, tmp_path / "one", "--fp8", "--zero-points", "--chips", 2, "--out", tmp_path / "two")
    assert "--zero-points" in line or "can only be re-sharded with the same" in line


def test_the_flags_that_are_said_name_the_method(wide: Path, tmp_path: Path) -> None:
    invoke(quantize, wide, "--int4", "--method", "rtn", "--out", tmp_path / "one")
    line = invoke_error(quantize, tmp_path / "one", "--int8", "--chips", 2, "--out", tmp_path / "two")
    assert "--int4 --group-size 128 --method rtn" in line


# --- finished and interrupted outputs


def test_a_finished_output_of_another_format_needs_force(wide: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    invoke(quantize, wide, "--int4", "--chips", 2, *out)
    for flags in (["--int4", "--zero-points"], ["--int4", "--group-size", "64"], ["--int4", "--method", "rtn"]):
        refuse(tmp_path, quantize, wide, *flags, "--chips", 2, *out, says=["--force"])
        invoke(quantize, wide, *flags, "--chips", 2, "--out", tmp_path / "straight", "--force")
        invoke(quantize, wide, *flags, "--chips", 2, *out, "--force")
        assert files(tmp_path / "out") == files(tmp_path / "straight")
        invoke(quantize, wide, "--int4", "--chips", 2, *out, "--force")


@pytest.mark.parametrize("flags", [["--int4", "--zero-points"], ["--fp8"], ["--int8", "--group-size", "32"]], ids=str)
@pytest.mark.parametrize("parameters", [1, 5, 10])
def test_an_interrupted_run_is_resumed(wide: Path, flags: list[str], parameters: int, tmp_path: Path) -> None:
    """Killed after so many parameters: the rest gives the files of an undisturbed run, report included."""
    run = (wide, *flags, "--chips", 3)
    kill_after(parameters, tmp_path / "out", *run)
    invoke(quantize, *run, "--out", tmp_path / "out")
    invoke(quantize, *run, "--out", tmp_path / "straight")
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_an_interrupted_run_is_not_resumed_by_another_method(wide: Path, tmp_path: Path) -> None:
    """Nor with other groups or zero points; where --method changes nothing, it may be another."""
    run = (wide, "--int4", "--chips", 3)
    kill_after(5, tmp_path / "out", *run)
    for flags in (["--method", "rtn"], ["--group-size", "64"], ["--zero-points"]):
        refuse(tmp_path, quantize, *run, *flags, "--out", tmp_path / "out", says=["--force"])
    invoke(quantize, *run, "--method", "rtn", "--out", tmp_path / "out", "--force")
    invoke(quantize, *run, "--method", "rtn", "--out", tmp_path / "straight")
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    run = (wide, "--fp8", "--chips", 3)
    kill_after(5, tmp_path / "fp8", *run)
    invoke(quantize, *run, "--method", "rtn", "--out", tmp_path / "fp8")


def kill_after(parameters: int, out: Path, *run: object) -> None:
    """Kill a run of llama-quantize once so many parameters are in the files, and the journal says so."""
    noted = []
    note = Journal.note

    def count(self: Journal, *args: object, **how: object) -> None:
        note(self, *args, **how)
        self.wait()
        noted.append(args)
        if len(noted) == parameters:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SYNC_BYTES", 0)
        kill_at(Journal, "note", quantize, *run, "--out", out, instead=count)
    positions = json.loads((out / ".journal.json").read_text())["positions"]
    assert len(positions) == 3
    assert all(0 < position <= (out / f"{name}.partial").stat().st_size for name, position in positions.items())
