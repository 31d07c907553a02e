"""4-bit integers in words of 32 bits, against the compressed-tensors library and by hand."""

from __future__ import annotations

import pytest
import torch
from by_hand import unpacked
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from converters.formats.packed_integers import pack, unpack, word_count

SHAPES = [(1, 1), (1, 8), (5, 8), (7, 9), (8, 16), (9, 1), (13, 45), (17, 3), (64, 171)]


def drawn(shape: tuple[int, int]) -> torch.Tensor:
    """All of -8 to 7 where there is room, at places that differ by shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_words_are_those_of_the_library(shape: tuple[int, int], axis: int) -> None:
    values = drawn(shape)
    words = pack(values, axis)
    expected = pack_to_int32(values, 4, packed_dim=axis)
    assert (words.dtype, words.shape[axis]) == (torch.int32, word_count(shape[axis]))
    assert torch.equal(words, expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_the_library(shape: tuple[int, int], axis: int) -> None:
    """Of words in which no bit is known, and of those that hold values."""
    length = list(shape)
    length[axis] = word_count(shape[axis])
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**31), 2**31, length, generator=generator, dtype=torch.int64).to(torch.int32)
    for each in (words, pack(drawn(shape), axis)):
        found = unpack(each, shape[axis], axis)
        assert found.dtype == torch.int8
        assert torch.equal(found, unpack_from_int32(each, 4, torch.Size(shape), packed_dim=axis))
        assert torch.equal(found.long(), torch.from_numpy(unpacked(each.numpy(), shape[axis], axis)))
    assert torch.equal(found, drawn(shape))


@pytest.mark.parametrize("axis", [0, 1])
def test_any_strides(axis: int) -> None:
    """Columns and rows cut out of a larger tensor, as chips' parts are, and a transposed one."""
    whole = drawn((40, 51))
    for part in (whole[3:30, 5:28], whole.T[7:20], whole[::2, ::3]):
        words = pack(part, axis)
        assert torch.equal(words, pack_to_int32(part, 4, packed_dim=axis))
        for each in (words, words.T.contiguous().T):
            assert torch.equal(unpack(each, part.shape[axis], axis), part)


def test_bits_by_hand() -> None:
    """0x76543210 holds 0 to 7 less 8; the first of a row that isn't full is in the lowest bits, the rest are 0."""
    values = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1], [7, 0, -8, -8, -8, -8, -8, -8]], dtype=torch.int8)
    assert pack(values).tolist() == [[0x76543210], [0x8F]]
    assert pack(values[:, :3]).tolist() == [[0x210], [0x08F]]
    assert pack(values, axis=0).tolist() == [[15 << 4 | 0, 8 << 4 | 1, 2, 3, 4, 5, 6, 7]]
