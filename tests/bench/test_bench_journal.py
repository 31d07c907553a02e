"""The journal of llama-bench: torn anywhere it goes on, other arguments and other files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters.console.errors import InputError
from runtime.bench.journal import FILE_NAME, is_journal, open_journal

ARGUMENTS = {"shards_digest": "ab", "repeat": 3, "batch_sizes": [1, 2]}
FIGURES = {"per_token_latency_ms": 2.5, "prefill_ms": 1.0, "platform": "cpu/xla", "chips": 4}


def _run(number: int, **outcome: Any) -> dict[str, Any]:
    return {"point": {"batch_size": number}, "wall_s": 1.5, **(outcome or {"figures": FIGURES})}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three runs, one of them failed."""
    path = tmp_path / FILE_NAME
    with open_journal(path, ARGUMENTS, force=False) as journal:
        for run in (_run(1), _run(2, error="no → room\nat all"), _run(1)):
            journal.append(run)
    return path


def test_runs_come_back(path: Path) -> None:
    with open_journal(path, ARGUMENTS, force=False) as journal:
        assert journal.runs == [_run(1), _run(2, error="no → room\nat all"), _run(1)]
        assert journal.of({"batch_size": 1}) == [_run(1), _run(1)]
        assert journal.of({"batch_size": 2}) == []


def test_torn_anywhere_it_goes_on(path: Path) -> None:
    """Whole lines stay, the torn one goes, and what is appended is whole."""
    content = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 4
    near = {end + shift for end in ends for shift in (-2, -1, 0, 1)}
    for length in sorted({*range(0, len(content), 11), *near} - {len(content), len(content) + 1}):
        path.write_bytes(content[:length])
        with open_journal(path, ARGUMENTS, force=False) as journal:
            kept = max(0, sum(end <= length for end in ends) - 1)
            assert len(journal.runs) == kept
            journal.append(_run(9))
        lines = path.read_text().splitlines()
        assert [json.loads(line)["point"] for line in lines[1:]][-1] == {"batch_size": 9}
        assert len(lines) == 1 + kept + 1


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("damage", ["", "{", "[]", '{"point": {}}', '{"point": 1, "wall_s": 1, "error": "x"}'])
def test_damage_before_the_end_is_refused(path: Path, number: int, damage: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = damage
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with (
        pytest.raises(InputError, match=f"damaged in line {number}.*--force"),
        open_journal(path, ARGUMENTS, force=False),
    ):
        pass
    assert path.read_bytes() == before
    with open_journal(path, ARGUMENTS, force=True) as journal:
        assert journal.runs == []
        assert path.read_bytes() == before  # until the caller says so
        journal.begin()
    with open_journal(path, ARGUMENTS, force=False) as journal:
        assert journal.runs == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "content",
    [b"my notes", b"my notes\n", b"{}\n", b"{}", b"\0" * 100, b"\n", b'{"format": 1}\n', b'{"arguments": {}}\n',
     b'{"format_version": 1}\n', b'{"format_version": 1}\n{"loss": 2}\n'],
)  # fmt: skip
def test_another_file_of_that_name_is_kept(tmp_path: Path, content: bytes, force: bool) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    assert not is_journal(path)
    with pytest.raises(InputError, match="not written by llama-bench"), open_journal(path, ARGUMENTS, force):
        pass
    assert path.read_bytes() == content


def test_a_journal_is_known_by_its_header(path: Path) -> None:
    assert is_journal(path)
    assert not is_journal(path.with_name("none"))
    assert not is_journal(path.parent)
    header = path.read_bytes().splitlines(keepends=True)[0]
    for content, ours in ((header, True), (header[:-1], False), (b"", False)):
        path.write_bytes(content)
        assert is_journal(path) == ours


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"repeat": 2}, "repeat 3, now 2"),
        ({"batch_sizes": [1]}, r"batch_sizes \[1, 2\], now \[1\]"),
        ({"shards_digest": "cd"}, r"other shards \(shards\)"),
        ({"layers": 2}, "layers None, now 2"),
    ],
)
def test_other_arguments_are_refused_or_forced(path: Path, changed: dict[str, Any], says: str) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError, match=says), open_journal(path, ARGUMENTS | changed, force=False):
        pass
    assert path.read_bytes() == before
    with open_journal(path, ARGUMENTS | changed, force=True) as journal:
        assert journal.runs == []
        journal.begin()
    with open_journal(path, ARGUMENTS | changed, force=False) as journal:
        assert journal.runs == []


def test_a_bench_that_measured_nothing_binds_nobody(tmp_path: Path) -> None:
    for arguments in (ARGUMENTS, {"repeat": 1}):
        with open_journal(tmp_path / FILE_NAME, arguments, force=False) as journal:
            assert journal.runs == []
    assert json.loads((tmp_path / FILE_NAME).read_text())["arguments"] == {"repeat": 1}


def test_one_process_at_a_time(path: Path) -> None:
    with open_journal(path, ARGUMENTS, force=False):
        for force in (False, True):
            with pytest.raises(InputError, match="Another llama-bench"), open_journal(path, ARGUMENTS, force=force):
                pass
