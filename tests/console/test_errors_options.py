"""Options that contradict each other or ask for what isn't there, and what a command loads before it answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from invoke import SUPPORT, invoke, invoke_error, refuse
from models import random_tensors, write_hf

from converters.cli import command as convert
from converters.model.families.presets import PRESETS
from quantize.cli import command as quantize
from runtime.cli import command as run

COMMANDS = {
    "llama-convert": "converters.cli",
    "llama-quantize": "quantize.cli",
    "llama-run": "runtime.cli",
    "llama-plan": "runtime.plan_cli",
}
HEAVY = ("torch", "torch_xla", "numpy", "rich", "safetensors", "gguf", "tokenizers")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory, untied and tied, and shards of it for 2 chips."""
    root = tmp_path_factory.mktemp("options")
    write_hf(root / "hf")
    headless = {name: tensor for name, tensor in random_tensors().items() if name != "lm_head.weight"}
    write_hf(root / "tied", headless, tie_word_embeddings=True)
    invoke(quantize, root / "hf", "--int8", "--chips", 2, "--out", root / "shards")
    return root


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--config (random weights) or --source"),
        (("--config", "tiny", "--source", "hf"), "--config (random weights) or --source"),
        (("--config", "8B"), "'8B'; give one of " + ", ".join(PRESETS)),
        (("--config", ""), "config.json"),
        (("--source", "hf", "--storage", "seed"), "--storage seed"),
        (("--source", "hf", "--layers", "3"), "--layers 3 does not fit small; give 1 to 2"),
        (("--source", "hf", "--layers", "0"), "--layers"),
        (("--source", "hf", "--layers", "x"), "--layers"),
        (("--config", "tiny", "--layers", "5"), "1 to 4"),
        (("--config", "tiny", "--seed", "-1"), "--seed"),
        (("--config", "tiny", "--dtype", "int8"), "'bfloat16', 'float16', 'float32'"),
        (("--config", "tiny", "--storage", "disk"), "'auto', 'files', 'seed'"),
        (("--config", "tiny", "surplus"), "surplus"),
        (("--config",), "--config"),
        *(
            (("--config", "tiny", "--max-shard-size", size), f"{size!r} is no size")
            for size in ("", "0", "0GB", "-1GB", "GB", "5XB", "1e3", "0.1KB5", "nan", "inf", "9" * 400 + "GB")
        ),
    ],
    ids=str,
)
def test_convert(root: Path, arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    refuse(root, convert, *arguments, says=[says])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("hf",), "Give --int8, --int4, --fp8 or --bf16"),
        (("hf", "--int8", "--chips", "4", "--target", "v4-16"), "--chips 4 contradicts --target v4-16, which has 8"),
        (("hf", "--int8", "--chips", "4", "--target", "tpu7x-8"), "tpu7x-8, which has 8 devices on 4 chips. Give one"),
        (("hf", "--int8", "--target", "v3-8"), "'v3-8'; give one of v4-8, v4-16"),
        (("hf", "--int8", "--target", "v4-7"), "'v4-7'"),
        (("hf", "--int8", "--target", "v4-0"), "'v4-0'"),
        (("hf", "--int8", "--target", ""), "''"),
        (("hf", "--int8", "--target", "v5e-99999"), "'v5e-99999'"),
        (("hf", "--int8", "--chips", "0"), "--chips"),
        (("hf", "--int8", "--chips", "4097"), "--chips"),
        (("hf", "--int8", "--chips", "2", "--only-chip", "2"), "--only-chip 2: 2 chips are numbered 0 to 1"),
        (("hf", "--int8", "--only-chip", "-1"), "--only-chip"),
        (("hf", "--int8", "--layers", "3"), "--layers 3 does not fit small; give 1 to 2"),
        (("hf", "--bf16", "--quantize-lm-head"), "--bf16 quantizes nothing"),
        (("tied", "--int8", "--quantize-lm-head"), "tied embeddings"),
        (("hf", "surplus", "--int8"), "surplus"),
        (("none", "--int8"), "none does not exist"),
        (("--int8",), "checkpoint does not exist"),
        (("--verify",), "llama-quantize"),
    ],
    ids=str,
)
def test_quantize(root: Path, arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    refuse(root, quantize, *arguments, says=[says])
    if "--int8" in arguments or "--bf16" in arguments:
        refuse(root, quantize, *arguments, "--dry-run", says=[says])


RUN_ERRORS = [
    ((), "--shards"),
    (("--shards", "none"), "none"),
    (("--shards", "hf"), "hf has no shards.json"),
    (("--shards", "shards", "--prompt", "a", "--prompt-ids", "1"), "--prompt or --prompt-ids"),
    (("--shards", "shards", "--prompt", "a"), "tokenizer.json"),
    (("--shards", "shards", "--prompt-ids", "1,x"), "'1,x' is no list of token ids"),
    (("--shards", "shards", "--prompt-ids", ""), "token ids"),
    *((("--shards", "shards", "--prompt-ids", text), "token ids") for text in ("1_0", "1,", "\u0661", "1.0", "0x1")),
    (("--shards", "shards", "--prompt-ids", "1," * 3000 + "x"), "... is no list of token ids"),
    (("--shards", "shards", "--prompt-ids", "1,50"), "Token id 50 is outside the vocabulary of 50"),
    (("--shards", "shards", "--prompt-ids", "-1"), "Token id -1 is outside"),
    (("--shards", "shards", "--prompt-ids", str(10**30)), f"{10**30} is outside"),
    (("--shards", "shards", "--prompt-ids", "1,2,3", "--max-seq-len", "2"), "3 tokens long and --max-seq-len is 2"),
    (("--shards", "shards", "--prompt-len", "257"), "257 tokens long and --max-seq-len is 256"),
    (("--shards", "shards", "--prompt-len", str(10**12)), "--max-seq-len is 256"),
    (("--shards", "shards", "--temperature", "nan"), "have to be numbers"),
    (("--shards", "shards", "--temperature", "inf"), "have to be numbers"),
    (("--shards", "shards", "--temperature", "1", "--top-p", "nan"), "have to be numbers"),
    (("--shards", "shards", "--temperature", "-1"), "--temperature"),
    (("--shards", "shards", "--top-p", "0"), "--top-p"),
    (("--shards", "shards", "--compile-cache", "/proc/nothing"), "/proc/nothing can't be made"),
    (("--shards", "shards", "--prompt-len", "0"), "--prompt-len"),
    (("--shards", "shards", "--batch-size", "0"), "--batch-size"),
    (("--shards", "shards", "--layers", "3"), "--layers 3 does not fit small; give 1 to 2"),
    (("--shards", "shards", "--dtype", "float16"), "'bfloat16', 'float32'"),
    (("--shards", "shards", "--backend", "tpu"), "'xla', 'inductor', 'eager'"),
    *((("--shards", "shards", "--buckets", text), "--buckets") for text in ("", "0", "-1", "128,", "2,1", "1,1", "x")),
]


@pytest.mark.parametrize(("arguments", "says"), RUN_ERRORS, ids=str)
def test_run(root: Path, arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    refuse(root, run, *arguments, says=[says])


def test_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    for content in (b"", b"{", b"{}", b"\xff\xfe"):
        (tmp_path / "hf" / "tokenizer.json").write_bytes(content)
        invoke(quantize, tmp_path / "hf", "--int8", "--out", tmp_path / "shards", "--force")
        refuse(tmp_path, run, "--shards", tmp_path / "shards", "--prompt", "a", says=["tokenizer.json"])


def test_sizes_beyond_any_memory(root: Path) -> None:
    for option in ("--batch-size", "--max-seq-len", "--prompt-len"):
        sizes = {"--prompt-len": 1, "--max-seq-len": 8 if option == "--batch-size" else 10**15} | {option: 10**14}
        arguments = [str(word) for pair in sizes.items() for word in pair]
        invoke_error(run, "--shards", root / "shards", "--backend", "eager", *arguments)


# --- what is loaded before an answer

PROBE = """
import sys
from importlib import import_module
from converters.console.command import run
try:
    run(import_module(sys.argv[1]).command, sys.argv[2:])
finally:
    print(*(name for name in {heavy!r} if name in sys.modules), file=open({report!r}, "w"))
"""


def loaded_by(command: str, arguments: tuple[object, ...], report: Path) -> tuple[int, str, set[str]]:
    """Exit status, stderr and the heavy modules loaded when a command ends, in a process of its own."""
    code = PROBE.format(heavy=HEAVY, report=str(report))
    words = [sys.executable, "-c", code, COMMANDS[command], *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=report.parent)
    return done.returncode, done.stderr, set(report.read_text().split())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["-h"], 0), (["--version"], 0), (["--hlep"], 2)])
def test_answers_load_nothing_heavy(command: str, arguments: list[str], status: int, tmp_path: Path) -> None:
    code, stderr, heavy = loaded_by(command, tuple(arguments), tmp_path / "report")
    assert code == status, stderr
    assert heavy == set()
    assert stderr.startswith("Error: No such option") if status else stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_scripts_are_installed(command: str, tmp_path: Path) -> None:
    """The console script itself; --version names the package's version."""
    script = Path(sys.executable).parent / command
    for argument, status in (("--version", 0), ("--help", 0), ("--hlep", 2)):
        done = subprocess.run([script, argument], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == status
        assert done.stderr == "" if status == 0 else len(done.stderr.splitlines()) == 1
        assert "0.1.0" in done.stdout or argument != "--version"


def test_errors_in_options_load_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for command, *arguments in (
        ("llama-convert", "--config", "8B"),
        ("llama-convert", "--source", tmp_path / "none"),
        ("llama-convert", "--source", tmp_path / "hf"),
        ("llama-run", "--shards", tmp_path / "none"),
        ("llama-run", "--shards", tmp_path / "hf"),
        ("llama-run", "--shards", tmp_path / "hf", "--buckets", "2,1"),
    ):
        code, stderr, heavy = loaded_by(command, tuple(arguments), tmp_path / "report")
        assert (code, heavy) == (2, set()), (command, arguments, stderr)
        assert len(stderr.splitlines()) == 1


def test_convert_and_quantize_never_load_torch_xla(root: Path, tmp_path: Path) -> None:
    """For real work, of every kind."""
    for command, *arguments in (
        ("llama-convert", "--source", root / "hf", "--out", tmp_path / "a"),
        ("llama-convert", "--config", "tiny", "--layers", "1", "--storage", "files", "--out", tmp_path / "b"),
        ("llama-quantize", root / "hf", "--int8", "--chips", "3", "--out", tmp_path / "c", "--verify"),
        ("llama-quantize", root / "shards", "--int8", "--chips", "3", "--out", tmp_path / "d", "--verify"),
    ):
        code, stderr, heavy = loaded_by(command, tuple(arguments), tmp_path / "report")
        assert code == 0, stderr
        assert "torch" in heavy
        assert "torch_xla" not in heavy


def test_errors_of_run_come_before_torch_xla(root: Path, tmp_path: Path) -> None:
    """Bringing up the chips takes seconds, and on a slice all its hosts: not for a prompt that can't be run."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules["accelerate"] = None  # where it is installed, transformers, which our helpers import, has it load torch_xla
from invoke import invoke_error
from runtime.cli import command
for arguments in eval(sys.argv[2]):
    invoke_error(command, *arguments)
    assert "torch_xla" not in sys.modules, arguments
print("done")
"""
    errors = repr([arguments for arguments, _ in RUN_ERRORS])
    words = [sys.executable, "-c", code, str(SUPPORT), errors]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root)
    assert done.stdout == "done\n", done.stderr


def test_json_that_cannot_be_written_shows_before_the_run(tmp_path: Path) -> None:
    line = invoke_error(run, "--shards", tmp_path, "--json", tmp_path / "no" / "folder.json")
    assert "--json" in line
    assert not (tmp_path / "no").exists()
