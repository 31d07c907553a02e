"""Tensors of a pickled file are read from where they lie in it, and no longer through its mapping."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from converters.console.errors import InputError
from converters.files.memory_maps import file_offset, mappings
from converters.formats.tensor_files import PickleFile


@pytest.mark.parametrize("name", ["plain.pth", "with space.pth", "line\nbreak.pth", "ü\\012.pth"])
def test_place_in_the_file(name: str, tmp_path: Path) -> None:
    """The bytes of the file at the place found are the tensor's, whatever the file is called."""
    path = tmp_path / name
    expected = {"a": torch.arange(5000.0), "b": torch.randn(70, 90).bfloat16()}
    torch.save(expected, path)
    mapped = torch.load(path, mmap=True, weights_only=True)
    places = mappings(path)
    for key, tensor in expected.items():
        offset = file_offset(places, mapped[key].data_ptr(), mapped[key].nbytes)
        assert offset is not None
        with path.open("rb") as file:
            file.seek(offset)
            assert file.read(tensor.nbytes) == tensor.view(torch.uint8).numpy().tobytes()
    elsewhere = torch.ones(100)
    assert file_offset(places, elsewhere.data_ptr(), elsewhere.nbytes) is None
    assert file_offset(places, mapped["a"].data_ptr(), 1 << 40) is None
    assert mappings(tmp_path / "another") == []


def test_rows_where_no_mapping_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems without /proc."""
    tensor = torch.randn(9, 4)
    torch.save({"a": tensor}, tmp_path / "m.pth")
    monkeypatch.setattr("converters.formats.tensor_files.mappings", lambda path: [])
    assert torch.equal(PickleFile(tmp_path / "m.pth").rows("a", 2, 7), tensor[2:7])


def test_a_file_cut_while_it_is_read(tmp_path: Path) -> None:
    """Through a mapping this would end the process."""
    torch.save({"a": torch.randn(9000, 4)}, tmp_path / "m.pth")
    file = PickleFile(tmp_path / "m.pth")
    os.truncate(tmp_path / "m.pth", 5000)
    with pytest.raises(InputError, match="has become shorter"):
        file.rows("a", 8000, 9000)


def test_reading_leaves_no_pages_of_the_mapping_behind(tmp_path: Path) -> None:
    """Rows taken in many small blocks, as a conversion takes them, of tensors that lie between each other's pages."""
    path = tmp_path / "m.pth"
    torch.save({f"{number}": torch.ones(1000, 500) for number in range(10)}, path)
    file = PickleFile(path)
    for start in range(0, 1000, 50):
        for name in file.names():
            file.rows(name, start, start + 50)
    assert resident_kb(path) <= 64


def resident_kb(path: Path) -> int:
    """The kilobytes of this process's mappings of a file that are in memory."""
    total, wanted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key = line.split(maxsplit=5)
        if "-" in key[0]:
            wanted = len(key) == 6 and key[5] == str(path)
        elif wanted and key[0] == "Rss:":
            total += int(key[1])
    return total
