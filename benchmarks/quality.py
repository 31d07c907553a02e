"""What formats and methods cost a model in quality: divergence and perplexity by llama-eval, sizes and times.

    python benchmarks/quality.py CHECKPOINT --calibrate TEXT --text TEXT [--only uniform,calibrated,fit] [--folder /tmp]
                                            [--calibration-tokens 8192] [--tokens 2048] [--json FILE]

Every row is made by llama-quantize for one chip and measured by llama-eval against the checkpoint, in float32. The text
to measure on must be another than that to calibrate on. With --json, each result is saved when it is ready, and a run
with the same file continues where another stopped.

uniform      every format by its default method, and 4 bits by the largest magnitude (rtn)
calibrated   4 bits by every method that looks at the text
fit          mixtures for five sizes between the smallest format and int8, beside the formats of one kind
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(sys.executable).parent
GROUPS = ("64", "32")
FIT_POINTS = 5


class Results:
    """Figures by llama-quantize's options, measured when first asked for and kept in a file if one is given."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options, self._work = options, work
        path = options.json
        self._found: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8")) if path and path.exists() else {}

    def __call__(self, *flags: str) -> dict[str, Any]:
        key = " ".join(flags)
        if key not in self._found:
            print(f"measuring {key}", file=sys.stderr, flush=True)
            self._found[key] = self._measure(flags)
            if self._options.json:
                self._options.json.write_text(json.dumps(self._found, indent=1) + "\n", "utf-8")
        return self._found[key]

    def _measure(self, flags: Sequence[str]) -> dict[str, Any]:
        options, out = self._options, self._work / "out"
        calibrated = "--method" in flags or "--fit" in flags
        more = ("--calibrate", options.calibrate, "--calibration-tokens", options.calibration_tokens)
        more = (*more, "--moments", self._work / "moments") if calibrated and "rtn" not in flags else ()
        begin = time.perf_counter()
        said = _run("llama-quantize", options.checkpoint, *flags, *more, "--out", out)
        seconds = time.perf_counter() - begin
        evaluated = _run(
            *("llama-eval", "--shards", out, "--against", options.checkpoint, "--text", options.text),
            *("--tokens", options.tokens, "--backend", "eager", "--json", "-"),
        )
        nbytes = sum(path.stat().st_size for path in out.glob("chip-*.safetensors"))
        shutil.rmtree(out)
        found = json.loads(evaluated[evaluated.index("{") :])
        return found | {"bytes": nbytes, "quantize_s": seconds, "said": said.splitlines()}


def _run(command: str, *arguments: Any) -> str:
    done = subprocess.run([SCRIPTS / command, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} {' '.join(map(str, arguments))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


HEADER = ["options", "MB", "s", "KL, nats per token", "99% of KL", "same first", "perplexity", "ratio"]


def _row(name: str, found: dict[str, Any]) -> list[str]:
    against = found["against"]
    return [
        name,
        f"{found['bytes'] / 1e6:.1f}",
        f"{found['quantize_s']:.0f}",
        f"{against['kl_mean']:.4f} ± {against['kl_stderr']:.4f}",
        f"{against['kl_p99']:.3f}",
        f"{against['same_first']:.3f}",
        f"{found['perplexity']:.2f}",
        f"{against['ratio']:.4f} ± {against['ratio_stderr']:.4f}",
    ]


WIDE, NARROW = (["--int4", "--group-size", size] for size in GROUPS)
ZEROS = [*NARROW, "--zero-points"]


def uniform(results: Results) -> Iterator[list[str]]:
    """Without any text."""
    yield HEADER
    for flags in (["--int8"], ["--fp8"], [*WIDE, "--method", "rtn"], WIDE, NARROW, ZEROS):
        yield _row(" ".join(flags), results(*flags))


def calibrated(results: Results) -> Iterator[list[str]]:
    """With the text in view; the first row's time has the moments', which the others take."""
    yield HEADER
    for method in ("scale", "awq", "gptq"):
        for flags in (WIDE, NARROW, ZEROS):
            flags = [*flags, "--method", method]
            yield _row(" ".join(flags), results(*flags))


def fit(results: Results) -> Iterator[list[str]]:
    """Mixtures, between the sizes of the smallest and the largest format of one kind."""
    yield [*HEADER, "predicted"]
    formats = [[*WIDE, "--method", "scale"], [*NARROW, "--method", "scale"], ["--int8"]]
    found = [(" ".join(flags), results(*flags)) for flags in formats]
    rows = [(each["bytes"], [*_row(name, each), ""]) for name, each in found]
    smallest, largest = min(size for size, _ in rows), max(size for size, _ in rows)
    for point in range(1, FIT_POINTS + 1):
        size = smallest + (largest - smallest) * point // (FIT_POINTS + 1)
        each = results("--fit", f"{size}B")
        predicted = next(line for line in each["said"] if line.startswith("Predicted loss"))
        rows.append((each["bytes"], [*_row(f"--fit {size}B", each), predicted.split()[2]]))
    yield from (row for _, row in sorted(rows))


TABLES = {"uniform": uniform, "calibrated": calibrated, "fit": fit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", default=",".join(TABLES))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        results = Results(options, Path(work))
        for name in options.only.split(","):
            for number, row in enumerate(TABLES[name](results)):
                print(f"| {' | '.join(row)} |", flush=True)
                if not number:
                    print("|" + "---|" * len(row))
            print()


if __name__ == "__main__":
    main()
