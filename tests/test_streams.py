"""Files read and written around the page cache hold what plain files would, at any offset and after any cut."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from converters.errors import InputError
from converters.streams import StreamReader, StreamWriter

CONTENT = random.Random(0).randbytes(5_000_123)  # two chunks and a rest that is no whole page


@pytest.mark.parametrize("cached", [True, False])
def test_reads_equal_the_file(tmp_path: Path, cached: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    rng = random.Random(1)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for _ in range(200):
            if not cached:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            count = rng.choice((1, 100, 65_536, 300_001, 2_000_000))
            offset = rng.randrange(len(CONTENT) - count)
            assert StreamReader(path).read(offset, count).numpy().tobytes() == CONTENT[offset : offset + count]
    assert StreamReader(path).read(17, len(CONTENT) - 17).numpy().tobytes() == CONTENT[17:]


@pytest.mark.parametrize("count", [100, 1_000_000])
def test_a_file_that_became_shorter_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    reader = StreamReader(path)
    os.truncate(path, 3_000_000)
    with pytest.raises(InputError, match="has become shorter"):
        reader.read(3_000_000 - count // 2, count)


def test_writes_in_any_pieces_and_resumed_anywhere_equal_one_write(tmp_path: Path) -> None:
    path, rng = tmp_path / "file", random.Random(2)
    position = 0
    while position < len(CONTENT):
        writer = StreamWriter(path, position)
        end = min(len(CONTENT), position + rng.choice((1, 5000, 1_500_000)))
        while position < end:
            count = min(end - position, rng.choice((1, 4096, 100_000, 3_000_000)))
            writer.write(CONTENT[position : position + count])
            position += count
            if rng.random() < 0.3:
                writer.flush()
                assert path.read_bytes() == CONTENT[:position]  # and writing goes on behind it
        writer.flush()
        writer.write(b"not flushed: lost, or cut when the file is continued")
        writer.close()
    writer = StreamWriter(path, len(CONTENT))
    os.fsync(writer.flush())
    writer.close()
    assert path.read_bytes() == CONTENT


def test_a_cut_file_goes_on_from_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    writer = StreamWriter(path, 1_234_567)
    writer.write(b"end")
    writer.flush()
    writer.close()
    assert path.read_bytes() == CONTENT[:1_234_567] + b"end"
