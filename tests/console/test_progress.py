"""Progress in a log: lines of its own, rarely, with done, share, rate and time left."""

from __future__ import annotations

import pytest

from converters.console import progress as module


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with module.progress("Quantizing", 4 * 10**9) as advance:
        for _ in range(40):
            now[0] += 1
            advance(50_000_000, "model.layers.17.mlp.up_proj.weight")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Quantizing layer 17: 500.00 MB of 4.00 GB (12%), 50.00 MB/s, 70 s left",
        "Quantizing layer 17: 2.00 GB of 4.00 GB (50%), 50.00 MB/s, 40 s left",
    ]


def test_parts_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with module.counted("Evaluating", 16) as advance:
        for _ in range(4):
            now[0] += 5
            advance(1)
    assert capsys.readouterr().err == "Evaluating: 2 of 16 (12%), 70 s left\n"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with module.progress("Converting", 100) as advance:
        advance(100)
    assert capsys.readouterr().err == ""
