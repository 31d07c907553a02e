"""The quantization error of every tensor and the worst of them, gathered block by block."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from quantize.formats.weight_format import RowErrors

if TYPE_CHECKING:
    import torch

FILE_NAME = "quantization_report.json"
FORMAT_VERSION = 1


class Report:
    """Errors of the quantized tensors. The relative error is norm(dequantized - weight) / norm(weight), and of outputs,
    where something is known of the inputs, the root of the mean square of the error by that of the outputs.

    Rows are added up exactly (math.fsum), each once, so that the report depends neither on the blocks in which they
    came nor on the runs that made the chips' files.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, _Sums] = {}
        self._name = ""
        self._rows: list[RowErrors] = []

    def expect(self, name: str) -> None:
        """List a tensor in the report, even if all of its rows here are padding."""
        self._tensors.setdefault(name, _Sums())

    def add(self, name: str, start: int, errors: RowErrors) -> None:
        """Add rows of a tensor from ``start`` on; they come in order, and rows added before are skipped."""
        if name != self._name:
            self._close()
            self._name = name
        self.expect(name)
        for first, stop in self._tensors[name].take(start, start + len(errors.max_error)):
            taken = slice(first - start, stop - start)
            self._rows.append(RowErrors(*(None if part is None else part[taken] for part in errors)))

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on from here, as JSON holds it."""
        self._close()
        return {name: sums.as_json() for name, sums in self._tensors.items()}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Start from the state of an earlier run."""
        self._tensors = {name: _Sums(**sums) for name, sums in (state or {}).items()}

    def content(self) -> dict[str, Any]:
        """quantization_report.json: relative and largest error of every quantized tensor, and the worst of them.

        Those of outputs are there where something was known of the inputs.
        """
        self._close()
        tensors = {name: sums.entry() for name, sums in self._tensors.items()}
        worst = max(tensors, key=lambda name: tensors[name]["relative_error"], default=None)
        return {"format_version": FORMAT_VERSION, "worst": worst, "tensors": tensors}

    def summary(self, format_name: str) -> str:
        """One line on what was quantized here, to the format of this name; empty where nothing was.

        Tensors that were kept as they are don't count.
        """
        self._close()
        errors = {name: sums.entry()["relative_error"] for name, sums in self._tensors.items() if sums.squared_weight}
        if not errors:
            return ""
        mean, worst = sum(errors.values()) / len(errors), max(errors, key=errors.__getitem__)
        line = f"Relative error of the {format_name} weights: mean {mean:.2%}, worst {errors[worst]:.2%} ({worst})"
        outputs = [entry["output_error"] for entry in self.content()["tensors"].values() if "output_error" in entry]
        return line + (f"; of their outputs: mean {sum(outputs) / len(outputs):.2%}" if outputs else "")

    def _close(self) -> None:
        """Sum up the rows added since the last call."""
        if self._rows:
            self._tensors[self._name].add(self._rows)
            self._rows = []


@dataclass
class _Sums:
    """The rows of a tensor seen so far, as ranges [start, stop), and their errors summed exactly, in parts."""

    rows: list[list[int]] = field(default_factory=list)
    squared_error: list[float] = field(default_factory=list)
    squared_weight: list[float] = field(default_factory=list)
    max_error: float = 0.0
    squared_output_error: list[float] = field(default_factory=list)
    squared_output: list[float] = field(default_factory=list)

    def take(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Mark rows as seen; returns the ranges of those that were not."""
        new, at = [], start
        for first, last in self.rows:
            if at < min(first, stop):
                new.append((at, min(first, stop)))
            at = max(at, last)
        if at < stop:
            new.append((at, stop))
        merged: list[list[int]] = []
        for first, last in sorted([*map(tuple, self.rows), *new]):
            if merged and merged[-1][1] == first:
                merged[-1][1] = last
            else:
                merged.append([first, last])
        self.rows = merged
        return new

    def add(self, rows: list[RowErrors]) -> None:
        self.squared_error = _exact_parts(self.squared_error, [part.squared_error for part in rows])
        self.squared_weight = _exact_parts(self.squared_weight, [part.squared_weight for part in rows])
        self.max_error = max(self.max_error, *(part.max_error.max().item() for part in rows))
        known = [part for part in rows if part.squared_output is not None]
        self.squared_output_error = _exact_parts(
            self.squared_output_error, [part.squared_output_error for part in known]
        )
        self.squared_output = _exact_parts(self.squared_output, [part.squared_output for part in known])

    def entry(self) -> dict[str, float]:
        """The tensor's entry in the report."""
        found = {"relative_error": _relative(self.squared_error, self.squared_weight), "max_error": self.max_error}
        if self.squared_output:
            found["output_error"] = _relative(self.squared_output_error, self.squared_output)
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _relative(squared_error: list[float], squared: list[float]) -> float:
    """The root of the quotient of two sums; 0 where there is nothing to be relative to."""
    whole = math.fsum(squared)
    return math.sqrt(math.fsum(squared_error) / whole) if whole else 0.0


def _exact_parts(parts: list[float], values: list[torch.Tensor]) -> list[float]:
    """The exact sum as a few floats, each of which rounds what the ones before it leave."""
    terms = [*parts, *(value for tensor in values for value in tensor.tolist())]
    found: list[float] = []
    while part := math.fsum([*terms, *(-done for done in found)]):
        found.append(part)
    return found
