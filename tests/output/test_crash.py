"""Real kills at random moments, and a really full disk: a rerun always ends byte-identical to an undisturbed run."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import child_command
import numpy as np
import pytest
import torch
from gptq_awq import awq_of, awq_settings, gptq_of, gptq_settings
from invoke import error_line, invoke, run_command
from meta_format import write_meta
from models import make_model, snapshot
from quantized import write_quantized

from converters.console.errors import InputError
from converters.output import preflight
from converters.sources.opening import open_source
from quantize.shards.reading import Shards

KILLS = 20  # of each of the kinds of run
_CONTEXT = multiprocessing.get_context("forkserver")
# Forked from one process that has loaded everything, so that the kills land in the work and not in the imports.
_CONTEXT.set_forkserver_preload(["quantize.job", "quantize.cli", "converters.convert", "converters.cli", "gguf"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str]]]:
    """The kinds of run by name: a command and its arguments but --out."""
    root = tmp_path_factory.mktemp("sources")
    make_model(root / "hf", heads=6, kv_heads=2, hidden=48, head_dim=16, layers=4, ffn=172, vocab=515)
    _write_gguf(root / "model.gguf")
    meta_sizes = {"heads": 8, "kv_heads": 4, "hidden": 64, "layers": 4, "ffn": 172, "vocab": 516}
    write_meta(root / "meta", make_model(root / "same", **meta_sizes), parts=4)
    config = root / "hf" / "config.json"
    for storage in ("files", "seed"):
        invoke(child_command.convert, "--config", config, "--storage", storage, "--out", root / storage)
    invoke(child_command.quantize, root / "files", "--int8", "--chips", 8, "--out", root / "shards")
    sizes = {"layers": 4, "ffn": 192, "vocab": 520}
    order = torch.arange(192).flip(0)
    write_quantized(
        root / "gptq",
        gptq_settings(desc_act=True),
        lambda _, weight: gptq_of(weight, order=order if weight.shape[1] == 192 else None),
        **sizes,
    )
    write_quantized(root / "awq", awq_settings(), lambda _, weight: awq_of(weight), [], **sizes)
    small = ["--max-shard-size", "150KB"]
    runs = {
        "convert-hf": ("convert", ["--source", root / "hf", *small]),
        "convert-seed": ("convert", ["--config", config, "--storage", "files", "--seed", 3, *small]),
        "convert-gguf": ("convert", ["--source", root / "model.gguf", *small]),
        "convert-meta": ("convert", ["--source", root / "meta", *small]),
        "convert-shards": ("convert", ["--source", root / "shards", *small]),
        "convert-shards-int8": ("convert", ["--source", root / "shards", "--keep-int8", *small]),
        "export-packed": ("convert", ["--source", root / "shards", "--format", "compressed-tensors", *small]),
        "export-gguf": ("convert", ["--source", root / "shards", "--format", "gguf"]),
        "quantize-files": ("quantize", [root / "files", "--int8", "--chips", 4]),
        "quantize-seed": ("quantize", [root / "seed", "--int8", "--chips", 3]),
        "reshard": ("quantize", [root / "shards", "--int8", "--chips", 3]),
        "convert-gptq": ("convert", ["--source", root / "gptq", *small]),
        "keep-awq": ("quantize", [root / "awq", "--keep", "--chips", 3]),
        "convert-force": ("convert", ["--source", root / "hf", *small, "--force"]),
        "quantize-force": ("quantize", [root / "files", "--int8", "--chips", 4, "--force"]),
    }
    return {name: (command, [str(argument) for argument in arguments]) for name, (command, arguments) in runs.items()}


def _write_gguf(path: Path) -> None:
    """A LLaMA of 48 dimensions with random float16 weights."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_embedding_length, 48), (writer.add_feed_forward_length, 172), (writer.add_block_count, 3),
        (writer.add_head_count, 6), (writer.add_head_count_kv, 2), (writer.add_key_length, 8),
        (writer.add_value_length, 8), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_context_length, 512),
    ):  # fmt: skip
        add(value)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (515, 48), "output": (515, 48), "output_norm": (48,)}
    for layer in range(3):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (48,), "attn_q": (48, 48), "attn_k": (16, 48), "attn_v": (16, 48), "attn_output": (48, 48),
                "ffn_norm": (48,), "ffn_gate": (172, 48), "ffn_up": (172, 48), "ffn_down": (48, 172),
            }.items()
        }  # fmt: skip
    for name, shape in shapes.items():
        dtype = np.float32 if len(shape) == 1 else np.float16
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _start(command: str, arguments: list[str], out: Path) -> multiprocessing.process.BaseProcess:
    process = _CONTEXT.Process(
        target=child_command.main, args=(command, [*arguments, "--out", str(out)], out.parent / "log")
    )
    process.start()
    return process


def _finish(command: str, arguments: list[str], out: Path) -> float:
    """Run to the end; returns the seconds that it took."""
    begin = time.monotonic()
    process = _start(command, arguments, out)
    process.join()
    assert process.exitcode == 0, (out.parent / "log").read_text()
    return time.monotonic() - begin


def _is_refused(command: str, out: Path) -> bool:
    """Whether what a killed run left is refused as input, in words that name it."""
    try:
        Shards(out) if command == "quantize" else open_source(out)
    except InputError as error:
        return str(out) in str(error)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *("convert-hf", "convert-seed", "convert-gguf", "convert-meta", "convert-shards", "convert-shards-int8"),
        *("export-packed", "export-gguf"),
        *("quantize-files", "quantize-seed", "reshard", "convert-force", "quantize-force"),
        *("convert-gptq", "keep-awq"),
    ],
)
def test_killed_anywhere_a_rerun_ends_the_same(
    sources: dict[str, tuple[str, list[str]]], kind: str, tmp_path: Path
) -> None:
    """SIGKILL and SIGTERM by turns; some reruns are killed as well. With --force an output of one layer is replaced."""
    command, arguments = sources[kind]
    (tmp_path / "earlier").mkdir()
    if "--force" in arguments:
        _finish(command, [*arguments, "--layers", "1"], tmp_path / "earlier" / "out")
    (tmp_path / "earlier" / "log").unlink(missing_ok=True)
    earlier = snapshot(tmp_path / "earlier")
    (tmp_path / "whole").mkdir()
    _finish(command, arguments, tmp_path / "whole" / "out")
    whole = snapshot(tmp_path / "whole" / "out")
    duration = min(_finish(command, arguments, tmp_path / f"timing{n}" / "out") for n in range(2) if _make(tmp_path, n))
    chance = random.Random(kind)
    unfinished = resumed = number = 0
    # On a busy machine most kills may come too early or too late: then there are more of them.
    while number < KILLS or (number < 5 * KILLS and (unfinished < KILLS // 4 or not resumed)):
        out = tmp_path / str(number) / "out"
        shutil.copytree(tmp_path / "earlier", out.parent)
        for attempt in range(chance.choice((1, 1, 1, 3))):
            process = _start(command, arguments, out)
            time.sleep(chance.uniform(0, duration * 1.05))
            process.kill() if (number + attempt) % 2 else process.terminate()
            process.join()
            if out.exists() and not _is_whole(out, whole) and not _is_whole(out.parent, earlier):
                unfinished += 1
                resumed += (out / ".journal.json").exists()
                assert _is_refused(command, out), sorted(snapshot(out))
        _finish(command, arguments, out)
        assert snapshot(out) == whole
        number += 1
    assert unfinished >= KILLS // 4  # else the kills came before the first byte or after the last
    assert resumed


def _is_whole(out: Path, whole: dict[str, str]) -> bool:
    """Whether all is there; the last moment may leave the lock and the journal, which the rerun removes."""
    passing = (".lock", ".lock.partial", ".journal.json", ".journal.json.partial", ".in-progress.json.partial", "log")
    return {name: digest for name, digest in snapshot(out).items() if Path(name).name not in passing} == whole


def _make(folder: Path, number: int) -> bool:
    (folder / f"timing{number}").mkdir()
    return True


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A tmpfs of its own; ``resize`` changes its size in bytes."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "none", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")

    def resize(count: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={count}", str(path)], check=True)

    yield SimpleNamespace(path=path, resize=resize)
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("kind", ["convert-hf", "quantize-files"])
def test_full_disk(
    sources: dict[str, tuple[str, list[str]]],
    kind: str,
    small_disk: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Filled by someone else after the check: a clear error, and a rerun with room ends the same."""
    command, arguments = child_command.COMMANDS[sources[kind][0]], sources[kind][1]
    invoke(command, *arguments, "--out", tmp_path / "whole")
    whole = snapshot(tmp_path / "whole")
    needed = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    chance = random.Random(kind)
    for number in range(20):
        out = small_disk.path / str(number)
        small_disk.resize(max(8192, int(needed * chance.uniform(0.02, 0.95))))
        with monkeypatch.context() as patch:
            patch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
            status, result = run_command(command, *arguments, "--out", out)
        assert status == 2
        line = error_line(result)
        assert "No space left on device" in line
        assert "run the same command again" in line
        small_disk.resize(needed * 2 + (1 << 20))
        invoke(command, *arguments, "--out", out)
        assert snapshot(out) == whole
        subprocess.run(["rm", "-r", str(out)], check=True)


def test_a_disk_too_small_is_found_out_before(
    sources: dict[str, tuple[str, list[str]]], small_disk: SimpleNamespace
) -> None:
    for kind in ("convert-hf", "quantize-files"):
        command, arguments = child_command.COMMANDS[sources[kind][0]], sources[kind][1]
        small_disk.resize(100_000)
        status, result = run_command(command, *arguments, "--out", small_disk.path / "out")
        assert status == 2
        assert "are free there" in error_line(result)
        assert list(small_disk.path.iterdir()) == []
