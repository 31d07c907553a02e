"""Files of torch.save before its zip format, or without it: what torch.load gives of them, read from where it lies."""

from __future__ import annotations

import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import invoke
from models import make_model
from safetensors.torch import load_file
from test_memory_maps import resident_kb

from converters.cli import command as convert
from converters.console.errors import InputError
from converters.files.memory_maps import file_offset
from converters.formats.tensor_files import PickleFile

_SHARED = torch.randn(12, 6)
TENSORS: dict[str, torch.Tensor] = {
    "float32": torch.randn(9, 4),
    "bfloat16": torch.randn(9, 4).bfloat16(),
    "float16": torch.randn(7).half(),
    "odd": torch.arange(5, dtype=torch.int8).view(5, 1),  # what follows is not aligned
    "behind": torch.randn(3, 3),
    "shared": _SHARED,
    "rows of it": _SHARED[3:7],
    "columns of it": _SHARED[:, 2:4],
    "transposed": torch.randn(4, 9).t(),
    "expanded": torch.randn(1, 4).expand(9, 4),
    "parameter": torch.nn.Parameter(torch.randn(4, 2)),
    "none": torch.empty(0, 4),
}


def save(content: Any, path: Path, **how: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False, **how)
    return path


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_rows_are_those_of_torch_load(container: type, protocol: int, tmp_path: Path) -> None:
    path = save(container(TENSORS), tmp_path / "m.bin", pickle_protocol=protocol)
    expected = torch.load(path, weights_only=True)
    file = PickleFile(path)
    assert file.names() == list(expected)
    for name, tensor in expected.items():
        assert (file.shape(name), file.dtype(name)) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for start, stop in ((0, len(tensor)), (1, 3)):
            assert torch.equal(file.rows(name, start, stop), tensor.detach()[start:stop]), name


def test_a_state_dict_with_what_torch_notes_beside_it(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    file = PickleFile(save(module.state_dict(), tmp_path / "m.bin"))
    assert torch.equal(file.rows("1.weight", 0, 2), module[1].weight)


def test_values_are_read_and_not_mapped(tmp_path: Path) -> None:
    path = save({f"{number}": torch.ones(1000, 500) for number in range(10)}, tmp_path / "m.bin")
    file = PickleFile(path)
    for start in range(0, 1000, 50):
        for name in file.names():
            rows = file.rows(name, start, start + 50)
            assert file_offset(file._mappings, rows.data_ptr(), rows.nbytes) is None
    assert resident_kb(path) <= 64


@pytest.mark.parametrize("form", ["hf", "tied"])
def test_a_model_is_converted(form: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", form="bin", tied=form == "tied")
    path = tmp_path / "hf" / "pytorch_model.bin"
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "zipped", "--dtype", "float32")
    save(torch.load(path, weights_only=True), path)
    invoke(convert, "--source", tmp_path / "hf", "--out", tmp_path / "out", "--dtype", "float32")
    got, expected = (load_file(tmp_path / name / "model-00001-of-00001.safetensors") for name in ("out", "zipped"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], model.state_dict()[name]) for name in got)


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    content = save({"a": torch.randn(9, 4), "b": torch.randn(3)}, tmp_path / "m.bin").read_bytes()
    cut = tmp_path / "cut.bin"
    for size in [*range(0, len(content), 7), len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"cut\.bin can't be loaded safely"):
            PickleFile(cut)


def test_damaged_bytes(tmp_path: Path) -> None:
    """Refused, or read with some values changed; never another exception, nor values from outside the file."""
    content = save({"a": torch.randn(9, 4), "b": torch.randn(3)}, tmp_path / "m.bin").read_bytes()
    generator, path = random.Random(0), tmp_path / "damaged.bin"
    outcomes = set()
    for _ in range(400):
        data = bytearray(content)
        for _ in range(generator.choice((1, 1, 3))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            file = PickleFile(path)
            for name in file.names():
                if file.shape(name) and len(file.shape(name)) == 2 and file.shape(name)[0] < 100:
                    file.rows(name, 0, file.shape(name)[0])
            outcomes.add("read")
        except InputError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("claimed", [10, 40, 255])
def test_a_tensor_larger_than_its_storage(claimed: int, tmp_path: Path) -> None:
    path = save({"a": torch.randn(9, 4)}, tmp_path / "m.bin")
    content = path.read_bytes()
    size = b"K\x09K\x04\x86"  # the pickled tuple (9, 4)
    assert content.count(size) == 1
    path.write_bytes(content.replace(size, b"K" + bytes([claimed]) + b"K\x04\x86"))
    with pytest.raises(InputError, match="can't be loaded safely"):
        PickleFile(path)


def test_a_storage_of_another_size_than_its_tensors_say(tmp_path: Path) -> None:
    path = save({"a": torch.randn(9, 4)}, tmp_path / "m.bin")
    content = path.read_bytes()
    count = (36).to_bytes(8, "little")
    assert content.count(count) == 1
    path.write_bytes(content.replace(count, (35).to_bytes(8, "little")))
    with pytest.raises(InputError, match="can't be loaded safely"):
        PickleFile(path)


def test_values_of_the_other_byte_order_are_refused(tmp_path: Path) -> None:
    """torch.load swaps them; rows are read as they lie."""
    torch.save({"w": torch.arange(3.0)}, tmp_path / "little.bin")
    with zipfile.ZipFile(tmp_path / "little.bin") as little, zipfile.ZipFile(tmp_path / "big.bin", "w") as big:
        for name in little.namelist():
            big.writestr(name, b"big" if name.endswith("/byteorder") else little.read(name))
    assert PickleFile(tmp_path / "little.bin").names() == ["w"]
    with pytest.raises(InputError, match="another byte order"):
        PickleFile(tmp_path / "big.bin")
