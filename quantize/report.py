"""What quantization cost: error per tensor and the worst, gathered while the blocks pass by."""

from __future__ import annotations

import math
from typing import Any

from quantize.int8 import RowError

FILE_NAME = "quantization_report.json"
FORMAT_VERSION = 1


class Report:
    """Errors of the quantized tensors. The relative error is norm(dequantized - weight) / norm(weight)."""

    def __init__(self) -> None:
        self._sums: dict[str, RowError] = {}

    def add(self, name: str, error: RowError) -> None:
        """Take in the error of some more rows of a tensor."""
        before = self._sums.get(name, RowError(0.0, 0.0, 0.0))
        self._sums[name] = RowError(
            before.squared_error + error.squared_error,
            before.squared_weight + error.squared_weight,
            max(before.max_error, error.max_error),
        )

    def content(self) -> dict[str, Any]:
        """quantization_report.json: relative and largest error of every quantized tensor, and the worst of them."""
        tensors = {
            name: {
                "relative_error": math.sqrt(sums.squared_error / sums.squared_weight) if sums.squared_weight else 0.0,
                "max_error": sums.max_error,
            }
            for name, sums in self._sums.items()
        }
        worst = max(tensors, key=lambda name: tensors[name]["relative_error"], default=None)
        return {"format_version": FORMAT_VERSION, "worst": worst, "tensors": tensors}

    def summary(self) -> str:
        """One line for the user; empty where nothing was quantized."""
        content = self.content()
        if content["worst"] is None:
            return ""
        worst = content["tensors"][content["worst"]]["relative_error"]
        errors = [entry["relative_error"] for entry in content["tensors"].values()]
        mean = sum(errors) / len(errors)
        return f"Relative error of the int8 weights: mean {mean:.2%}, worst {worst:.2%} ({content['worst']})"
