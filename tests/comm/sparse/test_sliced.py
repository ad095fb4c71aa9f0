"""Sliced experts over random placements: copies are exact to the bit, gradients are summed at every slice."""

import random
import time
from functools import reduce as fold
from operator import add

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.sparse.sliced import Sliced
from moetrain.ops.pinned import DeviceTables
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement, slice_rows
from moetrain.plan.transfers import gather_bytes, reduce_bytes
from tests.support.copied_experts import CPU, POSITIONS, SEEDS, group, placement_of

SHAPES = [(5, 3), (2, 4)]                    # rows that do not divide; of the second two positions have none
WIDTH = 5 * 3 + 2 * 4


def placement(seed: int) -> LayerPlacement:
    return placement_of(seed).with_sliced(tuple(random.Random(seed).sample(range(7), seed % 4 + 1)))


def numbers(key: int, dtype: torch.dtype) -> Tensor:
    """A row: both matrices of an expert, flat."""
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(key), dtype=torch.float64).to(dtype)


def slice_of(row_W: Tensor, at: int) -> list[Tensor]:
    """A position's rows of each matrix."""
    matrices = [part.view(shape) for part, shape in zip(row_W.split([15, 8]), SHAPES)]
    held = [slice_rows(rows, at, POSITIONS) for rows, _ in SHAPES]
    return [matrix[rows.start:rows.stop] for matrix, rows in zip(matrices, held)]


def flat(row_W: Tensor, at: int) -> Tensor:
    return torch.cat([part.flatten() for part in slice_of(row_W, at)])


def gathered(seed: int, dtype: torch.dtype) -> Tensor:
    layer, at = placement(seed), dist.get_rank()
    slices = (slice_of(numbers(expert, torch.float32), at) for expert in layer.sliced)
    tensors = [torch.stack(parts) for parts in zip(*slices)]
    return Sliced(layer, SHAPES, at, DeviceTables(CPU)).post_gather(tensors, group(), dtype).wait()


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_are_the_bits_of_the_slices_side_by_side(ranks, dtype):
    for seed in SEEDS:
        for at, rows in enumerate(ranks(POSITIONS).run(gathered, seed, dtype)):
            experts = placement(seed).assembled_at(at)
            assert rows.shape == (len(experts), WIDTH) and rows.dtype == dtype
            assert all(row.equal(numbers(expert, torch.float32).to(dtype))
                       for row, expert in zip(rows, experts)), (seed, at)


def gradient(expert: int, at: int, whole: bool) -> Tensor:
    if whole:
        generator = torch.Generator().manual_seed(100 * expert + at)
        return torch.randint(-2**20, 2**20, (WIDTH,), generator=generator).float()
    return numbers(100 * expert + at, torch.float32) * 10.0 ** at


def reduced(seed: int, whole: bool, late: tuple[int, ...] = (0,) * POSITIONS) -> Tensor:
    layer, at = placement(seed), dist.get_rank()
    rows = [gradient(expert, at, whole) for expert in layer.assembled_at(at)]
    collective = Sliced(layer, SHAPES, at, DeviceTables(CPU))
    time.sleep(late[at] / 100)
    received = collective.post_reduce(torch.stack(rows) if rows else torch.empty(0, WIDTH), group()).wait()
    return collective.sum_at_home(torch.zeros(len(layer.sliced), collective.widths[at]), received)


def assert_sums(results: list[Tensor], seed: int, whole: bool) -> None:
    layer = placement(seed)
    for at, sums in enumerate(results):
        for expert, ours in zip(layer.sliced, sums, strict=True):
            parts = [flat(gradient(expert, holder, whole), at) for holder in layer.holders(expert)]
            assert ours.equal(fold(add, parts, torch.zeros_like(ours))), (seed, at, expert)


@pytest.mark.ranks
@pytest.mark.parametrize("whole", [True, False], ids=["whole numbers", "holders ascending"])
def test_gradients_of_all_holders_are_summed_at_every_slice(ranks, whole):
    for seed in SEEDS:
        assert_sums(ranks(POSITIONS).run(reduced, seed, whole), seed, whole)


@pytest.mark.ranks
@pytest.mark.parametrize("late", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_what_arrives_first_does_not_count(ranks, late):
    assert_sums(ranks(POSITIONS).run(reduced, 12, False, late), 12, False)


def both_products(seed: int) -> tuple[float, float]:
    """This position's part of <spAG(x), y> and of <x, spRS(y)>."""
    layer, at = placement(seed), dist.get_rank()
    collective = Sliced(layer, SHAPES, at, DeviceTables(CPU))
    x = [numbers(expert, torch.float64) for expert in layer.sliced]
    slices = [torch.stack(parts) for parts in zip(*(slice_of(row, at) for row in x))]
    copies = collective.post_gather(slices, group()).wait()
    y = torch.randn(copies.shape, generator=torch.Generator().manual_seed(at), dtype=torch.float64)
    mine = torch.stack([flat(row, at) for row in x])
    sums = collective.sum_at_home(torch.zeros_like(mine), collective.post_reduce(y, group()).wait())
    return (copies * y).sum().item(), (mine * sums).sum().item()


@pytest.mark.ranks
def test_the_reduction_is_the_adjoint_of_the_gather(ranks):
    for seed in SEEDS:
        parts = ranks(POSITIONS).run(both_products, seed)
        gathered, reduced = (sum(part[side] for part in parts) for side in (0, 1))
        assert gathered == pytest.approx(reduced, rel=1e-12), seed


# --- bytes


def handed_over(seed: int) -> list[list[int]]:
    """Bytes that this position handed to all-to-alls for each other one: by the gather, by the reduction."""
    original, found = dist.all_to_all_single, []

    def counted(output, message, received, sent, **rest):
        found.append([rows * message.shape[1] * message.element_size() for rows in sent])
        return original(output, message, received, sent, **rest)

    dist.all_to_all_single = counted
    try:
        gathered(seed, torch.bfloat16)
        reduced(seed, whole=True)
    finally:
        dist.all_to_all_single = original
    return [[nbytes for to, nbytes in enumerate(handed) if to != dist.get_rank()] for handed in found]


@pytest.mark.ranks
def test_the_bytes_handed_over_are_those_of_the_formula(ranks):
    widths = [len(flat(torch.zeros(WIDTH), at)) for at in range(POSITIONS)]
    assert widths == [3, 3 + 4, 3, 6 + 4]
    for seed in SEEDS:
        results = ranks(POSITIONS).run(handed_over, seed)
        for way, formula, size in ((0, gather_bytes, 2), (1, reduce_bytes, 4)):
            slice_bytes = [size * width for width in widths]
            traffic = formula("packed", placement(seed), Topology(POSITIONS, 2), 0, slice_bytes)
            assert [sum(result[way]) for result in results] == list(map(add, *traffic)), seed


def test_a_hot_expert_is_sent_by_all_alike():
    everywhere = LayerPlacement((0,), 8, tuple((0, at) for at in range(1, 8)))
    assert gather_bytes("packed", everywhere, Topology(8, 8), 800).inside == (5600, *(0,) * 7)
    sliced = everywhere.with_sliced((0,))
    assert gather_bytes("packed", sliced, Topology(8, 8), 800, [100] * 8).inside == (700,) * 8
    inside, between = gather_bytes("packed", everywhere.with_sliced((0,)), Topology(8, 2), 800, [100] * 8)
    assert inside == (100,) * 8 and between == (600,) * 8
