"""What quantization cost: error per tensor and the worst, gathered while the blocks pass by."""

from __future__ import annotations

import math
from typing import Any

from quantize.int8 import RowErrors

FILE_NAME = "quantization_report.json"
FORMAT_VERSION = 1


class Report:
    """Errors of the quantized tensors. The relative error is norm(dequantized - weight) / norm(weight).

    Rows are added up exactly (math.fsum), so that the report doesn't depend on the blocks in which they came.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, float]] = {}
        self._name = ""
        self._rows: list[RowErrors] = []

    def add(self, name: str, errors: RowErrors) -> None:
        """Take in some more rows of a tensor; a tensor's rows come one after another."""
        if name != self._name:
            self._close()
            self._name = name
        self._rows.append(errors)

    def finished(self) -> dict[str, dict[str, float]]:
        """The entries of the tensors that came so far, whole ones: what ``restore`` takes."""
        self._close()
        return dict(self._tensors)

    def restore(self, tensors: dict[str, dict[str, float]]) -> None:
        """Begin with the entries of an earlier run."""
        self._tensors = dict(tensors)

    def content(self) -> dict[str, Any]:
        """quantization_report.json: relative and largest error of every quantized tensor, and the worst of them."""
        self._close()
        worst = max(self._tensors, key=lambda name: self._tensors[name]["relative_error"], default=None)
        return {"format_version": FORMAT_VERSION, "worst": worst, "tensors": self._tensors}

    def summary(self) -> str:
        """One line for the user; empty where nothing was quantized."""
        content = self.content()
        if content["worst"] is None:
            return ""
        worst = content["tensors"][content["worst"]]["relative_error"]
        errors = [entry["relative_error"] for entry in content["tensors"].values()]
        mean = sum(errors) / len(errors)
        return f"Relative error of the int8 weights: mean {mean:.2%}, worst {worst:.2%} ({content['worst']})"

    def _close(self) -> None:
        """Sum up the tensor whose rows have been coming."""
        if not self._rows:
            return
        squared_error, squared_weight = (
            math.fsum(value for rows in self._rows for value in part(rows).tolist())
            for part in (lambda rows: rows.squared_error, lambda rows: rows.squared_weight)
        )
        self._tensors[self._name] = {
            "relative_error": math.sqrt(squared_error / squared_weight) if squared_weight else 0.0,
            "max_error": max(rows.max_error.max().item() for rows in self._rows),
        }
        self._rows = []
