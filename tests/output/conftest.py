"""What the tests of outputs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from invoke import Fill
from models import write_hf

from converters.cli import command as convert
from converters.output import preflight
from quantize.cli import command as quantize


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf")


@pytest.fixture(params=["convert", "quantize"])
def fill(request: pytest.FixtureRequest, hf: Path) -> Fill:
    """A command that writes a directory, with the arguments for its input; the test adds --out."""
    return (convert, ("--source", hf)) if request.param == "convert" else (quantize, (hf, "--int8"))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets how many bytes are free on every disk."""
    return lambda count: monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": count, "total": 10**12})
    )
