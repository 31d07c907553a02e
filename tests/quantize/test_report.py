"""The quantization report: sums that don't depend on the order and the parts in which rows come."""

from __future__ import annotations

import json

import torch

from quantize.formats.int8 import quantize_rows
from quantize.report import Report


def test_report_adds_up_exactly_in_any_parts() -> None:
    """Against one sum over all rows; 0.1 and its like don't add up in floating point."""
    _, errors = quantize_rows(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)))
    part = lambda start, stop: type(errors)(*(values[start:stop] for values in errors[:3]))  # noqa: E731
    whole, split = Report(), Report()
    whole.add("a", 0, errors)
    for start, stop in ((200, 300), (0, 50), (20, 120), (0, 50), (100, 210), (290, 300)):
        split.add("a", start, part(start, stop))
        split.restore(json.loads(json.dumps(split.state())))
    assert split.content() == whole.content()
    assert split.state() == whole.state()
    assert whole.state()["a"]["rows"] == [[0, 300]]
