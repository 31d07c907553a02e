"""The post's figures 1 and 5 by the TPU's own compiler: published, predicted, roofline, ratio. No TPU is needed.

    python benchmarks/tpu_table.py [--only published,forms,int8,modern,formats] [--batch-sizes 1,2,4,8] [--layers N]
                                    [--json FILE]

Every decode step is llama-run's, traced and compiled at full depth (llama-plan --compile), which takes from 10 s for 7B
to a minute for 175B, and about three quarters of an hour for all tables. With --json, each result is saved when it is
ready, and a run with the same file continues where another stopped.

published   bfloat16 at batch size 1 where the post gives a time; each is predicted by a model fitted on the other
            eight, as in runtime/plan/latency.py
forms       batch size 1 as one row, which goes to the vector unit, and as two rows, compared with a batch of 2
int8        int8 compared with bfloat16, by batch size
modern      one slice each of v5e, v5p and v6e
formats     bf16, fp8, int8 and int4 (groups of 128), in steps and in a bucket of 512 tokens
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.model.families.presets import PRESETS
from quantize.shards.scheme import Scheme
from quantize.slices import find_slice
from runtime.plan.latency import PUBLISHED, Point, fit_hop_ms, predicted_ms
from runtime.plan.plan import Workload

SLOTS = 256  # the post's max_seq_len
FORMS = (("7B", "bf16", "v4-8"), ("65B", "bf16", "v4-32"), ("175B", "int8", "v4-16"))
SLICES = (
    "7B:v4-8",
    "7B:v4-16",
    "13B:v4-8",
    "33B:v4-16",
    "33B:v4-32",
    "65B:v4-16",
    "65B:v4-32",
    "175B:v4-32",
    "175B:v4-64",
)
ONLY_INT8 = (("175B", "v4-16"),)
FORMATS = (
    ("7B", "v5e-4"),
    ("65B", "v5e-16"),
    ("65B", "v4-8"),
    ("175B", "v4-8"),
    ("175B", "v4-16"),
    ("175B", "v6e-16"),
)
SCHEMES = ("bf16", "fp8", "int8", "int4-g128")
BUCKET = 512
MODERN = (("7B", "v5e-8"), ("65B", "v5e-8"), ("65B", "v5p-16"), ("65B", "v6e-8"))


@dataclass(frozen=True)
class Case:
    """A decode step to compile, and a bucket if there is one; the cache has ``slots`` slots.

    ``rows`` is the fewest rows that its matrix products are given.
    """

    model: str
    scheme: str
    target: str
    batch_size: int
    rows: int = 2
    slots: int = SLOTS
    bucket: int | None = None

    @property
    def key(self) -> str:
        more = "" if self.slots == SLOTS else f" {self.slots} {self.bucket}"
        return f"{self.model} {self.scheme} {self.target} {self.batch_size} {self.rows}{more}"


class Compiled:
    """Results by case, compiled when first asked for and kept in a file if one is given."""

    def __init__(self, layers: int | None, path: Path | None) -> None:
        self._layers, self._path = layers, path
        self._found: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._found = json.loads(path.read_text("utf-8"))

    def __call__(self, case: Case) -> dict[str, Any]:
        if case.key not in self._found:
            print(f"compiling {case.key}", file=sys.stderr, flush=True)
            self._found[case.key] = self._compile(case)
            if self._path is not None:
                self._path.write_text(json.dumps(self._found, indent=1) + "\n", "utf-8")
        return self._found[case.key]

    def _compile(self, case: Case) -> dict[str, Any]:
        from runtime.plan.compiled_plan import compile_plan

        config = PRESETS[case.model].with_dtype("bfloat16")
        config = config if self._layers is None else config.cut(min(self._layers, config.num_layers))
        workload = Workload(config, Scheme(case.scheme), case.batch_size, case.slots)
        slice_ = find_slice(case.target)
        if not workload.on(slice_.devices).fits(slice_):
            return {"fits": False}
        buckets = () if case.bucket is None else (case.bucket,)
        content = compile_plan(workload, slice_, buckets, least_rows=case.rows).to_json()
        return content | {"roofline_ms": workload.on(slice_.devices).roofline_ms(slice_)}


def published(compiled: Compiled) -> Iterator[list[str]]:
    """Figure 1, and how well each of its times is predicted from the others."""
    yield ["model", "slice", "published, ms", "predicted, ms", "ratio", "estimate, ms", "roofline, ms", "collectives"]
    points = [_fresh(point, compiled(Case(point.model, "bf16", point.target, 1))) for point in PUBLISHED]
    errors = []
    for point in points:
        predicted = predicted_ms(point, points)
        ratio = predicted / point.published_ms
        errors.append(abs(ratio - 1))
        roofline = compiled(Case(point.model, "bf16", point.target, 1))["roofline_ms"]
        times = (point.published_ms, predicted, ratio, point.estimated_ms, roofline)
        yield [point.model, point.target, *(f"{time:.2f}" for time in times), str(point.collectives)]
    yield []
    yield [
        f"An exchange takes {1000 * fit_hop_ms(points):.2f} us by the fit on all. Left out in turn: "
        f"{sum(errors) / len(errors):.1%} off in the mean, {max(errors):.1%} at worst."
    ]
    for point, kept in zip(points, PUBLISHED, strict=True):
        if abs(point.estimated_ms - kept.estimated_ms) > 0.0006 or point.collectives != kept.collectives:
            yield [f"runtime/plan/latency.py is out of date: {point}"]


def _fresh(point: Point, result: dict[str, Any]) -> Point:
    count = sum(collective["count"] for collective in result["collectives"].values())
    return replace(point, estimated_ms=result["estimated_ms"], collectives=count)


def forms(compiled: Compiled) -> Iterator[list[str]]:
    """The effect of the second row."""
    yield ["model", "slice", "batch 1, one row, ms", "batch 1, two rows, ms", "batch 2, ms", "two rows to batch 2"]
    for model, scheme, target in FORMS:
        one, two, pair = (
            compiled(Case(model, scheme, target, batch, rows))["estimated_ms"]
            for batch, rows in ((1, 1), (1, 2), (2, 2))
        )
        yield [f"{model} {scheme}", target, f"{one:.2f}", f"{two:.2f}", f"{pair:.2f}", f"{two / pair:.2f}"]


def int8(compiled: Compiled, batch_sizes: list[int]) -> Iterator[list[str]]:
    """Figure 5: estimates and predictions, and how many times as fast int8 is by each."""
    yield [
        "model",
        "slice",
        "batch",
        "bf16 estimate, ms",
        "int8 estimate, ms",
        "faster",
        "bf16 predicted, ms",
        "int8 predicted, ms",
        "faster",
        "roofline, bf16 / int8, ms",
    ]
    for model, target in (*(slice_.split(":") for slice_ in SLICES), *ONLY_INT8):
        for batch in batch_sizes:
            small = compiled(Case(model, "int8", target, batch))
            if (model, target) in ONLY_INT8:
                yield [
                    model,
                    target,
                    str(batch),
                    "does not fit",
                    _ms(small),
                    "",
                    "",
                    _predicted(small),
                    "",
                    _roofline(small),
                ]
                continue
            large = compiled(Case(model, "bf16", target, batch))
            yield [
                *(model, target, str(batch), _ms(large), _ms(small)),
                f"{large['estimated_ms'] / small['estimated_ms']:.2f}",
                *(_predicted(large), _predicted(small)),
                f"{large['prediction']['ms'] / small['prediction']['ms']:.2f}",
                f"{_roofline(large)} / {_roofline(small)}",
            ]


def modern(compiled: Compiled) -> Iterator[list[str]]:
    """int8 on other generations; the time of collectives is the one fitted for v4."""
    yield ["model", "slice", "batch", "fits", "estimate, ms", "predicted, ms", "roofline, ms", "temporaries, MB"]
    for model, target in MODERN:
        for batch in (1, 8):
            found = compiled(Case(model, "int8", target, batch))
            fits, temp = "yes" if found["fits"] else "no", f"{found['temp_bytes'] / 1e6:.0f}"
            yield [model, target, str(batch), fits, _ms(found), _predicted(found), _roofline(found), temp]


def formats(compiled: Compiled, batch_sizes: list[int]) -> Iterator[list[str]]:
    """Every format's step and bucket: arguments, temporaries, and the estimates' ratios: of times or, where there is no
    clock, of cycles. The bucket is that of the first batch size.
    """
    yield [
        *("model", "slice", "format", "arguments, GB", "temporaries, MB", "written out"),
        *(f"step of {batch}" for batch in batch_sizes),
        *(f"to int8, {batch}" for batch in batch_sizes),
        f"bucket of {BUCKET}",
        "to bf16",
    ]
    for model, target in FORMATS:
        found = {
            scheme: [
                compiled(Case(model, scheme, target, batch, slots=BUCKET, bucket=None if place else BUCKET))
                for place, batch in enumerate(batch_sizes)
            ]
            for scheme in SCHEMES
        }
        for scheme, steps in found.items():
            yield [model, target, scheme, *_format_row(steps, found["int8"], found["bf16"])]


def _format_row(steps: list[dict[str, Any]], int8: list[dict[str, Any]], bf16: list[dict[str, Any]]) -> list[str]:
    if "temp_bytes" not in steps[0]:
        return ["does not fit", *[""] * (4 + 2 * len(steps))]
    buckets = [each[0].get("buckets", {}).get(str(BUCKET), {}) for each in (steps, bf16)]
    return [
        f"{steps[0]['argument_bytes'] / 1e9:.2f}",
        " / ".join(f"{step['temp_bytes'] / 1e6:.0f}" for step in steps),
        " / ".join(str(step["dequantized_weights"]) for step in steps),
        *(_cost(step) for step in steps),
        *(_ratio(*pair) for pair in zip(steps, int8, strict=True)),
        _cost(buckets[0]),
        _ratio(*buckets),
    ]


def _cost(result: dict[str, Any]) -> str:
    return f"{result['cycles'] / 1e6:.2f} M" if result["estimated_ms"] is None else f"{result['estimated_ms']:.2f} ms"


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> str:
    if not one.get("cycles") or not other.get("cycles"):
        return ""
    key = "cycles" if one["estimated_ms"] is None else "estimated_ms"
    return f"{one[key] / other[key]:.2f}"


def _ms(result: dict[str, Any]) -> str:
    return "clock unknown" if result["estimated_ms"] is None else f"{result['estimated_ms']:.2f}"


def _predicted(result: dict[str, Any]) -> str:
    return f"{result['prediction']['ms']:.2f}"


def _roofline(result: dict[str, Any]) -> str:
    return f"{result['roofline_ms']:.2f}"


def _table(rows: Iterator[list[str]]) -> None:
    """Print rows as Markdown; a row with a single cell becomes a line of text, an empty row an empty line."""
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |" if len(row) > 1 else "".join(row), flush=True)
        if not number:
            print("|" + "---|" * len(row))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="published,forms,int8,modern,formats")
    parser.add_argument("--batch-sizes", default="1,2,4,8")
    parser.add_argument("--layers", type=int, help="of each model, for a quick look; not what is published")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    batch_sizes = [int(size) for size in options.batch_sizes.split(",")]
    compiled = Compiled(options.layers, options.json)
    tables = {
        "published": lambda: published(compiled),
        "forms": lambda: forms(compiled),
        "int8": lambda: int8(compiled, batch_sizes),
        "modern": lambda: modern(compiled),
        "formats": lambda: formats(compiled, batch_sizes),
    }
    unknown = [name for name in options.only.split(",") if name not in tables]
    if unknown:
        parser.error(f"unknown table {unknown[0]!r}; give some of {', '.join(tables)}")
    for name in options.only.split(","):
        _table(tables[name]())
    versions = ", ".join(f"{name} {version(name)}" for name in ("libtpu", "jax", "jaxlib", "torch", "torch_xla"))
    print(f"{versions}; peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
