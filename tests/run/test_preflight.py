"""What a run needs of memory is said before it loads, and refused where it isn't there."""

from __future__ import annotations

from pathlib import Path

import pytest
from invoke import invoke, invoke_error, notes
from models import make_model

from converters.console.errors import InputError
from quantize.cli import command as quantize
from runtime.cli import command as run
from runtime.devices.backend import Memory
from runtime.run import preflight, session
from runtime.run.preflight import Needs, check_memory

HIDDEN, FFN, VOCAB, LAYERS, SLOTS = 64, 128, 256, 2, 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preflight")
    make_model(root / "hf", hidden=HIDDEN, ffn=FFN, vocab=VOCAB, layers=LAYERS)
    invoke(quantize, root / "hf", "--bf16", "--chips", 1, "--out", root / "out")
    return root / "out"


def decode(shards: Path) -> list[object]:
    return [
        "--shards",
        shards,
        "--backend",
        "eager",
        "--prompt-ids",
        "1,2",
        "--max-new-tokens",
        1,
        "--max-seq-len",
        SLOTS,
    ]


def test_it_is_said_in_bytes_that_a_formula_gives(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: 3_000_000)
    weights = 2 * VOCAB * HIDDEN + LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN + 2 * HIDDEN) + HIDDEN
    cache = 2 * LAYERS * SLOTS * HIDDEN  # of bfloat16, like the weights
    expected = (
        f"Memory of this host: {2 * (weights + cache) / 1000:.2f} kB of 3.00 MB that are free (1 chip with "
        f"{2 * weights / 1000:.2f} kB of parameters and {2 * cache / 1000:.2f} kB of KV cache each), and a program's "
        "temporaries."
    )
    assert expected in notes(invoke(run, *decode(shards)))


def test_too_little_is_an_error_before_anything_is_loaded(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: 100_000)
    monkeypatch.setattr(session, "load_tensors", None)
    line = invoke_error(run, *decode(shards))
    assert "of this host, where 100.00 kB are free" in line
    assert "--layers" in line


class _Chips:
    """Two local chips with memory of their own."""

    def __init__(self, free: int | None) -> None:
        self.free = free

    def memory(self) -> Memory:
        return Memory(2, on_host=False, free_bytes=self.free)


def test_chips_with_their_own_memory_hold_only_their_own_part() -> None:
    needs = Needs(parameters=70, cache=30)
    check_memory(needs, _Chips(100))
    check_memory(needs, _Chips(None))
    with pytest.raises(InputError, match="on each chip, where 99 bytes are free"):
        check_memory(needs, _Chips(99))
