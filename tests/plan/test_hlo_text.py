"""Reading the compiler's text, and pricing it: a module small enough to be priced by hand."""

from __future__ import annotations

import pytest

from runtime.plan.chips import CHIPS
from runtime.plan.estimate import Kind, estimate
from runtime.plan.hlo import parse_module

# A product whose weight comes through a copy, a step of attention, a row taken out of a table, an all-reduce.
TEXT = """HloModule step, is_scheduled=true, num_partitions=4

%row_of (param_0: bf16[800,400], param_1: s32[]) -> bf16[1,400] {
  %param_0 = bf16[800,400]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = bf16[1,400]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,400}
}

%dot_of (param_0.1: s8[600,400], param_1.1: bf16[1,400]) -> bf16[600] {
  %param_0.1 = s8[600,400]{1,0} parameter(0)
  %param_1.1 = bf16[1,400]{1,0} parameter(1)
  ROOT %dot.1 = bf16[600]{0} dot(%param_1.1, %param_0.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (p0: bf16[800,400], p1: s8[600,400], p2: bf16[1,2,64,32], p3: s32[]) -> (bf16[600], /*index=1*/f32[2,64]) {
  %p0 = bf16[800,400]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[4,1]<=[4]}
  %p1 = s8[600,400]{1,0:T(8,128)(4,1)} parameter(1)
  %p2 = bf16[1,2,64,32]{3,2,1,0} parameter(2)
  %p3 = s32[]{:T(128)} parameter(3)
  %copy-start = (s8[600,400]{1,0:T(8,128)S(3)}, s8[600,400]{1,0}, u32[]{:S(2)}) copy-start(%p1)
  %row = bf16[1,400]{1,0:T(2,128)S(3)} fusion(%p0, %p3), calls=%row_of, backend_config={"x":{"estimated_cycles":"1050"}}
  %all-reduce.1 = bf16[1,400]{1,0} all-reduce(%row), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %copy-done = s8[600,400]{1,0:T(8,128)S(3)} copy-done(%copy-start)
  %product = bf16[600]{0} fusion(%copy-done, %all-reduce.1), calls=%dot_of, backend_config={"estimated_cycles":"21"}
  %scores = f32[2,64]{1,0} fusion(%p2, %product), calls=%missing, backend_config={"estimated_cycles":"2100"}
  %moved = f32[64,2]{1,0} transpose(%scores), dimensions={1,0}
  %again = (s32[]) while(%p3), condition=%c, body=%b
  %near-start = (bf16[1,2,64,32]{3,2,1,0:S(3)}, bf16[1,2,64,32]{3,2,1,0}, u32[]{:S(2)}) copy-start(%p2)
  %near = bf16[1,2,64,32]{3,2,1,0:S(3)} copy-done(%near-start)
  %new = bf16[1,2,1,32]{3,2,1,0:S(3)} bitcast(%row)
  %updated = bf16[1,2,64,32]{3,2,1,0:S(3)} dynamic-update-slice(%near, %new, %p3, %p3, %p3, /*index=5*/%p3)
  %back-start = (bf16[1,2,64,32]{3,2,1,0}, bf16[1,2,64,32]{3,2,1,0:S(3)}, u32[]{:S(2)}) copy-start(%updated)
  %back = bf16[1,2,64,32]{3,2,1,0} copy-done(%back-start)
  %mixed = f32[2,32]{1,0} fusion(%updated, %scores), calls=%missing, backend_config={"estimated_cycles":"1050"}
  ROOT %tuple = (bf16[600]{0}, f32[2,64]{1,0}) tuple(%product, %scores)
}
"""


def test_instructions_are_read_whole() -> None:
    module = parse_module(TEXT)
    assert len(module.entry.instructions) == 20
    start, product = module.entry.instructions["copy-start"], module.entry.instructions["product"]
    assert [array.on_chip for array in start.results] == [True, False, True]
    assert (product.opcode, product.operands, product.calls, product.cycles) == (
        "fusion",
        ("copy-done", "all-reduce.1"),
        "dot_of",
        21,
    )
    assert module.entry.source(module.entry.instructions["copy-done"]).name == "p1"


def test_of_a_table_only_the_row_is_read() -> None:
    module = parse_module(TEXT)
    assert module.parameters_read(module.entry.instructions["row"]) == {"p0": 800, "p3": 4}
    assert module.parameters_read(module.entry.instructions["product"]) == {"p1": 240_000}


def test_priced_as_by_hand() -> None:
    priced = estimate(parse_module(TEXT), CHIPS["v4"], frozenset({2}), slots=64)
    bandwidth = 1200e9
    # The cost model's 21 cycles (20 ns) are less than the copied weight takes to read.
    assert priced.shares[Kind.MATMUL].estimated_s == pytest.approx(240_000 / bandwidth)
    # 3,150 cycles at 1.05 GHz; without cycles the transpose of scores, 512 bytes in and 512 out, and the cache that was
    # updated near the chip and goes back to HBM, 8,192 bytes.
    assert priced.shares[Kind.ATTENTION].estimated_s == pytest.approx(3e-6 + (1024 + 8192) / bandwidth)
    # The cache is read once for the scores and once, after its update, for the values.
    assert priced.shares[Kind.ATTENTION].roofline_s == pytest.approx(2 * 8192 / bandwidth)
    assert priced.shares[Kind.REST].estimated_s == pytest.approx(1e-6)
    assert priced.collectives["all-reduce"].count == 1
    assert priced.collectives["all-reduce"].nbytes == 800
    assert priced.unpriced == {"transpose": 1, "copy-start": 1}
    assert priced.unpriced_s == pytest.approx((1024 + 8192) / bandwidth)
    assert priced.unknown == {"while": 1}
    assert not priced.complete


def test_a_text_without_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        parse_module("HloModule empty\n")
