"""How axes are split over chips: invariants for any numbers of heads and chips, and cases worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.console.errors import InputError
from converters.model.config import ModelConfig
from converters.model.families.llama import LLAMA
from converters.model.families.presets import PRESETS
from converters.model.parameters import Axis
from quantize.shards.partition import axis_segments, check_chips, plan_heads
from quantize.shards.stored import Scheme, stored_tensors

CONFIG = ModelConfig("test", 64, 172, 1, 9, 3, 16, vocab_size=515, architecture=LLAMA.architecture)


@given(st.integers(1, 24), st.integers(1, 16), st.integers(1, 40))
def test_every_query_head_stands_once_under_its_kv_head(kv_heads: int, group_size: int, chips: int) -> None:
    plan = plan_heads(kv_heads * group_size, kv_heads, chips)
    assert len(plan.kv_heads) == chips * plan.kv_per_chip
    assert len(plan.query_heads) == chips * plan.kv_per_chip * plan.group
    assert sorted(head for head in plan.query_heads if head is not None) == list(range(kv_heads * group_size))
    for place, head in enumerate(plan.query_heads):
        if head is not None:
            assert plan.kv_heads[place // plan.group] == head // group_size
    assert set(plan.kv_heads) - {None} == set(range(kv_heads))


@given(st.integers(1, 24), st.integers(1, 16), st.integers(1, 40))
def test_no_padding_where_chips_divide_heads(kv_heads: int, group_size: int, chips: int) -> None:
    plan = plan_heads(kv_heads * group_size * chips, kv_heads * chips, chips)
    assert plan.kv_heads == tuple(range(kv_heads * chips))
    assert plan.query_heads == tuple(range(kv_heads * chips * group_size))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "chips", "query_places", "kv_places"),
    [
        (9, 3, 4, 12, 4),  # SmolLM2-135M
        (52, 52, 8, 56, 56),  # LLaMA 33B
        (52, 52, 16, 64, 64),
        (64, 8, 16, 64, 16),  # LLaMA 2 70B: each KV head on two chips
        (24, 3, 2, 24, 6),  # the middle KV head on both chips, twice as many places: cheaper than padding queries
        (96, 96, 8, 96, 96),  # 175B
        (8, 8, 16, 16, 16),
    ],
)
def test_known_cases(heads: int, kv_heads: int, chips: int, query_places: int, kv_places: int) -> None:
    plan = plan_heads(heads, kv_heads, chips)
    assert (plan.query_places, plan.kv_places) == (query_places, kv_places)


@pytest.mark.parametrize("chips", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("axis", [Axis.VOCAB, Axis.FFN, Axis.QUERY, Axis.KV])
def test_segments_cover_an_axis(axis: Axis, chips: int) -> None:
    per_chip = axis_segments(CONFIG, axis, chips)
    assert len({sum(segment.length for segment in segments) for segments in per_chip}) == 1
    covered = [
        element
        for segments in per_chip
        for segment in segments
        if segment.start is not None
        for element in range(segment.start, segment.start + segment.length)
    ]
    assert set(covered) == set(range(axis.length(CONFIG)))
    if axis is not Axis.KV:
        assert covered == sorted(set(covered))  # only KV heads may be repeated


def test_33b_padding_is_what_the_heads_cost() -> None:
    """52 heads on 8 chips take 56 places: 4 heads of zeros, 512 rows of 6,656, in q, k, v and 512 columns in o."""
    config = PRESETS["33B"]
    stored = {each.name: each for each in stored_tensors(replace(config, num_layers=1), Scheme("bf16"))}
    extra = {name: each.padding(config, 8) for name, each in stored.items()}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert extra[f"model.layers.0.self_attn.{name}.weight"] == 4 * 128
    assert extra["model.layers.0.mlp.up_proj.weight"] == 0
    assert stored["model.layers.0.mlp.down_proj.weight"].local_shape(config, 8) == (6656, 17920 // 8)


@pytest.mark.parametrize("chips", [0, -1, 1 << 20, 2.0, True, None])
def test_impossible_numbers_of_chips(chips: object) -> None:
    with pytest.raises(InputError, match="chips"):
        check_chips(chips)
