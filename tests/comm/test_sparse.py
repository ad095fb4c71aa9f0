"""The sparse pair over random placements: copies are the home's bits, and gradients come home as the dense sum."""

import random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.sparse import lanes, post_gather, post_reduce, sparse_all_gather, sum_at_home
from moetrain.plan.placement import LayerPlacement

POSITIONS, WIDTH = 4, 6
CPU = torch.device("cpu")


def placement_of(seed: int) -> LayerPlacement:
    """Any homes (a position may own none or all), any copies (none, some, everywhere)."""
    draw = random.Random(seed)
    home = tuple(draw.choice([[draw.randrange(POSITIONS) for _ in range(7)], [draw.randrange(POSITIONS)] * 7]))
    pairs = [(expert, at) for expert in range(7) for at in range(POSITIONS) if at != home[expert]]
    return LayerPlacement(home, POSITIONS, tuple(draw.sample(pairs, draw.choice([0, 1, 5, len(pairs)]))))


def weight(expert: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(expert), dtype=torch.float64)


def group() -> Group:
    return Group("ep", tuple(range(POSITIONS)), dist.get_rank(), dist.group.WORLD)


def stack(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(rows).to(dtype) if rows else torch.zeros(0, WIDTH, dtype=dtype)


def gathered(seed: int, dtype: torch.dtype) -> Tensor:
    placement, at = placement_of(seed), dist.get_rank()
    homes = stack([weight(expert) for expert in placement.experts_of(at)], dtype)
    return post_gather([homes], lanes(placement, at, CPU), group()).wait()


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_copies_are_the_bits_of_their_homes_in_the_order_of_slots(ranks, seed, dtype):
    for position, copies in enumerate(ranks(POSITIONS).run(gathered, seed, dtype)):
        expected = stack([weight(expert) for expert in placement_of(seed).copies_at(position)], dtype)
        assert copies.equal(expected)


def gradient(expert: int, position: int, whole: bool) -> Tensor:
    generator = torch.Generator().manual_seed(100 * expert + position)
    if whole:
        return torch.randint(-2**20, 2**20, (WIDTH,), generator=generator).float()
    return torch.randn(WIDTH, generator=generator) * 10.0 ** (position * 3)      # so that the order of a sum shows


def reduced(seed: int, whole: bool) -> Tensor:
    placement, at = placement_of(seed), dist.get_rank()
    own = stack([gradient(expert, at, whole) for expert in placement.experts_of(at)], torch.float32)
    copies = stack([gradient(expert, at, whole) for expert in placement.copies_at(at)], torch.float32)
    lane = lanes(placement, at, CPU)
    return sum_at_home(own, post_reduce(copies, lane, group()).wait(), lane)


@pytest.mark.ranks
@pytest.mark.parametrize("whole", [True, False], ids=["whole numbers", "in the order of positions"])
@pytest.mark.parametrize("seed", range(8))
def test_gradients_of_all_copies_are_summed_at_home(ranks, seed, whole):
    placement = placement_of(seed)
    for position, sums in enumerate(ranks(POSITIONS).run(reduced, seed, whole)):
        for expert, ours in zip(placement.experts_of(position), sums, strict=True):
            expected = torch.zeros(WIDTH)
            for at in placement.holders(expert):         # ascending, the home in its place: the same bits every time
                expected += gradient(expert, at, whole)
            assert ours.equal(expected)


def both_products(seed: int) -> tuple[float, float]:
    """This rank's part of <spAG(x), y> and of <x, spRS(y)>."""
    placement, at = placement_of(seed), dist.get_rank()
    x = stack([weight(expert) for expert in placement.experts_of(at)], torch.float64).requires_grad_()
    slots = sparse_all_gather(x, lanes(placement, at, CPU), group())
    y = stack([weight(1000 + 10 * expert + at) for expert in placement.slots_of(at)], torch.float64)
    slots.backward(y)
    return (slots * y).sum().item(), (x * x.grad).sum().item()


@pytest.mark.ranks
@pytest.mark.parametrize("seed", range(8))
def test_the_reduction_is_the_adjoint_of_the_gathering(ranks, seed):
    parts = ranks(POSITIONS).run(both_products, seed)
    assert sum(part[0] for part in parts) == pytest.approx(sum(part[1] for part in parts), rel=1e-12)


@pytest.mark.ranks
def test_a_flight_is_taken_once(ranks):
    assert ranks(2).run(taken_twice) == [True, True]


def taken_twice() -> bool:
    placement = LayerPlacement((0, 1), 2, ((0, 1),))
    at = dist.get_rank()
    flight = post_gather([torch.ones(1, WIDTH)], lanes(placement, at, CPU), Group("ep", (0, 1), at, dist.group.WORLD))
    flight.wait()
    try:
        flight.wait()
    except AssertionError:
        return True
    return False
