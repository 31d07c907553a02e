"""Files read and written around the page cache hold what plain files would, at any offset and after any cut."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from pathlib import Path

import pytest

from converters.console.errors import InputError
from converters.files.streams import StreamReader, StreamWriter, chunk_bytes

CONTENT = random.Random(0).randbytes(5_000_123)  # two chunks and a rest that is no whole page


@pytest.mark.parametrize("cached", [True, False])
def test_reads_equal_the_file(tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    rng = random.Random(1)
    direct = 0

    def read_direct(self: StreamReader, descriptor: int, offset: int, count: int) -> object:
        nonlocal direct
        direct += 1
        return around(self, descriptor, offset, count)

    around = StreamReader._read_direct
    monkeypatch.setattr(StreamReader, "_read_direct", read_direct)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for _ in range(200):
            if not cached:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            count = rng.choice((1, 100, 65_536, 300_001, 2_000_000))
            offset = rng.randrange(len(CONTENT) - count)
            assert StreamReader(path).read(offset, count).numpy().tobytes() == CONTENT[offset : offset + count]
    assert StreamReader(path).read(17, len(CONTENT) - 17).numpy().tobytes() == CONTENT[17:]
    if _takes_direct(path):
        assert direct < 20 if cached else direct > 50  # what was in the cache may have been thrown out


def _takes_direct(path: Path) -> bool:
    """Whether this file system can be read around the page cache."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_a_file_system_that_refuses_direct_transfers_is_used_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EINVAL at the first transfer, and writes that take only a part."""
    refused = []
    preadv, pwrite = os.preadv, os.pwrite

    def refuse(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")

    def read(descriptor: int, buffers: list, offset: int, flags: int = 0) -> int:
        refuse(descriptor)
        return preadv(descriptor, buffers, offset, flags)

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        refuse(descriptor)
        return pwrite(descriptor, data[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "pwrite", write)
    path = tmp_path / "file"
    for begin, end in ((0, 3_000_001), (3_000_001, len(CONTENT))):
        writer = StreamWriter(path, begin)
        writer.write(CONTENT[begin:end])
        writer.flush()
        writer.close()
    assert path.read_bytes() == CONTENT
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert StreamReader(path).read(5, 1_000_000).numpy().tobytes() == CONTENT[5:1_000_005]
    assert bool(refused) == _takes_direct(path)


def test_chunks_shrink_where_many_files_are_written() -> None:
    for files in (1, 8, 64, 65, 1024, 100_000):
        chunk = chunk_bytes(files)
        assert chunk % 4096 == 0
        assert 4096 <= chunk <= 2 << 20
        assert 2 * files * chunk <= max(256 << 20, 2 * files * 4096)


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
