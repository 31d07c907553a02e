"""Prompts cut into sections of the buckets' sizes: as few as can be, inside the cache, nothing left out."""

from __future__ import annotations

import pytest

from converters.console.errors import InputError
from runtime.run.buckets import has_later_sections, parse_buckets, sections, usable_buckets

POST = (128, 256, 384, 512)


@pytest.mark.parametrize(("buckets", "slots"), [(POST, 2048), (POST, 2000), ((16, 32), 100), ((7,), 23), ((1,), 5)])
def test_sections_cover_a_prompt_with_as_few_executions_as_the_largest_bucket_allows(
    buckets: tuple[int, ...], slots: int
) -> None:
    for length in range(slots):  # the last token of a prompt that fills the cache goes to the decode step
        found = sections(length, buckets)
        assert len(found) == -(-length // buckets[-1])
        filled = 0
        for start, count, bucket in found:
            assert bucket in buckets
            assert start == filled  # no gap, and nothing twice
            assert start + bucket <= slots
            assert 0 < count <= bucket
            filled = start + count
        assert filled == length
        assert all(count == bucket == buckets[-1] for _, count, bucket in found[1:])  # one shape


@pytest.mark.parametrize(("prompt", "later"), [(1, False), (33, False), (34, True), (100, True)])
def test_later_sections_are_foreseen_where_a_prompt_takes_them(prompt: int, later: bool) -> None:
    filled = prompt - 1
    assert has_later_sections((16, 32), prompt) is later is (len(sections(filled, (16, 32))) > 1)


def test_a_first_section_takes_the_nearest_bucket() -> None:
    assert sections(100, POST) == [(0, 100, 128)]
    assert sections(129, POST) == [(0, 129, 256)]
    assert sections(512, POST) == [(0, 512, 512)]
    assert sections(1124, POST) == [(0, 100, 128), (100, 512, 512), (612, 512, 512)]


def test_executions_are_at_most_the_posts() -> None:
    """ "Any input prompt with up to 2,047 tokens requires up to 4 graph executions", a prompt of 1,500 tokens 4."""
    assert max(len(sections(length - 1, POST)) for length in range(1, 2048)) == 4
    assert len(sections(1499, POST)) == 3


def test_buckets_are_cut_to_the_cache() -> None:
    assert usable_buckets(POST, 256) == (128, 256)
    assert usable_buckets(POST, 100) == (100,)


@pytest.mark.parametrize("text", ["", "0,128", "256,128", "128,128", "a", "128,", "-1"])
def test_bad_buckets_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="give ascending prompt lengths"):
        parse_buckets(text)
