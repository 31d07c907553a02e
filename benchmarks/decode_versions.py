"""llama-run of this checkout and of another one, in turns, on the same shards: their figures side by side.

    git worktree add ../before COMMIT
    python benchmarks/decode_versions.py ../before --shards out1 out4 [--batch-sizes 1,8] [--prompt-len 128]
                                         [--new-tokens 32] [--turns 3] [--dtype bfloat16]

Every run is a process of its own. The table has the medians, and this checkout's share of the other's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
FIGURES = {
    "per_token_latency_ms": "ms a token",
    "prefill_ms": "prefill, ms",
    "compile_s": "compile, s",
    "rss": "RSS, GB",
}


def measure(checkout: Path, shards: Path, batch_size: int, options: argparse.Namespace) -> dict[str, float]:
    """One run's figures by their names in FIGURES."""
    bucket = 1 << max(7, (options.prompt_len - 1).bit_length())
    arguments = {
        "--shards": shards.resolve(),
        "--batch-size": batch_size,
        "--prompt-len": options.prompt_len,
        "--max-new-tokens": options.new_tokens,
        "--max-seq-len": bucket + options.new_tokens,
        "--buckets": bucket,
        "--dtype": options.dtype,
        "--json": "-",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from runtime.cli import main; main()", *(str(x) for x in sum(arguments.items(), ()))],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: status {done.returncode}\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return {name: found[name] for name in FIGURES if name != "rss"} | {
        "rss": found["memory"]["host_peak_rss_bytes"] / 1e9
    }


def rows(shards: Path, batch_size: int, options: argparse.Namespace) -> list[str]:
    """The table's rows for one setting, measured in turns."""
    runs: dict[str, list[dict[str, float]]] = {"other": [], "this": []}
    for _ in range(options.turns):
        for name, checkout in (("other", options.other.resolve()), ("this", HERE)):
            runs[name].append(measure(checkout, shards, batch_size, options))

    def median(name: str, figure: str) -> float:
        return statistics.median(run[figure] for run in runs[name])

    return [
        f"| {shards} | {batch_size} | {label} | {median('other', figure):.2f} | {median('this', figure):.2f} | "
        f"{median('this', figure) / median('other', figure):.2f} |"
        for figure, label in FIGURES.items()
    ]


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--shards", type=Path, nargs="+", required=True)
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options: Any = parsed(arguments)
    print("| shards | batch | figure | other | this | this / other |\n|---|---|---|---|---|---|")
    for shards in options.shards:
        for batch_size in map(int, options.batch_sizes.split(",")):
            print("\n".join(rows(shards, batch_size, options)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
