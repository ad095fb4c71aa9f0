"""csrc/launch.h under a host compiler: every token, slot and tile has exactly one owner in every shape."""

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from tests.ops.kernels_on_host import arithmetic

SHARED = 48 * 1024
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@given(st.one_of(st.integers(0, 40), st.integers(8000, 8400), st.integers(0, 2**40)))
@example(2**20 + 3)
@PROPERTY
def test_blocks_of_the_router_share_the_tokens_out(tokens):
    blocks = arithmetic("router_blocks", tokens)
    ranges = [arithmetic("router_tokens", block, tokens, answers=2) for block in range(blocks)]
    assert 1 <= blocks <= 512
    assert ranges[0][0] == 0 and ranges[-1][1] == tokens
    assert all(before[1] == after[0] < after[1] for before, after in zip(ranges, ranges[1:]))


def test_every_number_of_experts_up_to_1024_finds_room_in_registers_and_shared_memory():
    for experts in range(1, 1025):
        held = arithmetic("experts_per_lane", experts)
        assert held in (1, 2, 4, 8, 16, 32) and 32 * held >= experts and (held == 1 or 16 * held < experts)
        assert arithmetic("router_shared", experts) <= SHARED
    assert arithmetic("experts_per_lane", 1025) == 0


@given(st.one_of(st.integers(0, 3000), st.integers(0, 2**31)), st.integers(1, 12288))
@example(1024, 12288)
@example(1025, 1536)
@example(262144, 1537)
@PROPERTY
def test_units_of_the_route_plan_cover_the_slots_and_fit_in_shared_memory(slots, physical):
    units, warps, blocks, shared = arithmetic("plan", slots, physical, answers=4)
    assert units == -(-slots // 1024) and 1 <= warps <= 8
    assert (blocks - 1) * warps < max(units, 1) and blocks * warps >= units
    assert shared == 4 * warps * physical <= SHARED
    assert arithmetic("plan_scratch", slots, physical) == 4 * physical * (units + 1)


def test_more_physical_ids_than_counters_find_room_for_have_no_plan():
    assert arithmetic("plan", 10, 12289, answers=4)[1] == 0


@given(st.integers(0, 5), st.integers(1, 200), st.integers(1, 200))
@example(3, 64, 64)
@example(1, 1000, 72)
@PROPERTY
def test_tiles_of_a_weight_gradient_cover_every_element_once(experts, rows, columns):
    covered = torch.zeros(experts, rows, columns, dtype=torch.int32)
    for block in range(arithmetic("grad_tiles", experts, rows, columns)):
        expert, row, column = arithmetic("grad_tile", block, rows, columns, answers=3)
        assert row < rows and column < columns
        covered[expert, row:row + 64, column:column + 64] += 1
    assert (covered == 1).all()


def test_a_tile_of_the_largest_matrix_has_an_index_beyond_int32():
    rows, columns = 2 * 14336, 4096
    last = arithmetic("grad_tiles", 64, rows, columns) - 1
    expert, row, column = arithmetic("grad_tile", last, rows, columns, answers=3)
    assert (expert, row, column) == (63, rows - 64, columns - 64)
    assert expert * rows * columns + row * columns > 2**31


def test_rows_of_an_expert_lie_between_two_ends():
    ends = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    assert [arithmetic("rows_of", ends, e, answers=2) for e in range(4)] == [[0, 0], [0, 3], [3, 3], [3, 10]]


@pytest.mark.parametrize("items, blocks", [(0, 1), (1, 1), (8, 1), (9, 2), (2**40, 2**20)])
def test_grids_are_never_empty_and_never_too_large(items, blocks):
    assert arithmetic("warp_blocks", items) == blocks
