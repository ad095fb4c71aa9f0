"""Sparse collectives over random placements: copies are the home's bits, gradients come home as sums."""

import time
from functools import reduce as fold
from operator import add

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.sparse.base import Collective
from moetrain.comm.sparse.forms import FORMS, collective, sparse_all_gather
from moetrain.ops.pinned import DeviceTables
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.transfers import gather_bytes, reduce_bytes
from tests.support.copied_experts import CPU, POSITIONS, SEEDS, WIDTH, group, placement_of

NODES = {"one node": Topology(4, 4), "two nodes": Topology(4, 2), "uneven nodes": Topology(4, 3),
         "four nodes": Topology(4, 1)}
FORMS_AND_NODES = [("packed", "one node"), *(("two_level", nodes) for nodes in NODES)]


def forms_and_nodes(test):
    """Every form, over every kind of nodes."""
    ids = ["packed", *(f"two_level, {nodes}" for nodes in NODES)]
    return pytest.mark.parametrize("form, nodes", FORMS_AND_NODES, ids=ids)(test)


def weight(expert: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(expert), dtype=torch.float64)


def here(placement: LayerPlacement, form: str, nodes: str) -> Collective:
    return collective(form, placement, NODES[nodes], dist.get_rank(), DeviceTables(CPU))


def stack(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(rows).to(dtype) if rows else torch.zeros(0, WIDTH, dtype=dtype)


def gathered(seed: int, dtype: torch.dtype, form: str, nodes: str) -> Tensor:
    placement = placement_of(seed)
    homes = stack([weight(expert) for expert in placement.experts_of(dist.get_rank())], dtype)
    return here(placement, form, nodes).post_gather([homes], group()).wait()


@pytest.mark.ranks
@forms_and_nodes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_are_the_bits_of_their_homes_in_the_order_of_slots(ranks, dtype, form, nodes):
    for seed in SEEDS:
        for position, copies in enumerate(ranks(POSITIONS).run(gathered, seed, dtype, form, nodes)):
            expected = stack([weight(expert) for expert in placement_of(seed).copies_at(position)], dtype)
            assert copies.equal(expected), seed


def gradient(expert: int, position: int, whole: bool) -> Tensor:
    generator = torch.Generator().manual_seed(100 * expert + position)
    if whole:
        return torch.randint(-2**20, 2**20, (WIDTH,), generator=generator).float()
    return torch.randn(WIDTH, generator=generator) * 10.0 ** position     # so that the order of a sum shows


def reduced(seed: int, whole: bool, form: str, nodes: str, late: tuple[int, ...] = ()) -> Tensor:
    """late: hundredths of a second that each position comes later, to the start and to the wait."""
    placement, at = placement_of(seed), dist.get_rank()
    own = stack([gradient(expert, at, whole) for expert in placement.experts_of(at)], torch.float32)
    copies = stack([gradient(expert, at, whole) for expert in placement.copies_at(at)], torch.float32)
    sparse = here(placement, form, nodes)
    time.sleep(late[at] / 100 if late else 0)
    handle = sparse.post_reduce(copies, group())
    time.sleep(late[at - 1] / 100 if late else 0)
    return sparse.sum_at_home(own, handle.wait())


def expected_sum(expert: int, placement: LayerPlacement, whole: bool, form: str, nodes: str) -> Tensor:
    """Positions ascending, the home in its place: of all, or of each node and then nodes ascending."""
    node_of = NODES[nodes].node_of if form == "two_level" else lambda position: 0
    parts: dict[int, list[Tensor]] = {}
    for at in placement.holders(expert):
        parts.setdefault(node_of(at), []).append(gradient(expert, at, whole))
    return fold(add, [fold(add, node, torch.zeros(WIDTH)) for node in parts.values()], torch.zeros(WIDTH))


def assert_sums(results: list[Tensor], seed: int, whole: bool, form: str, nodes: str) -> None:
    placement = placement_of(seed)
    for position, sums in enumerate(results):
        for expert, ours in zip(placement.experts_of(position), sums, strict=True):
            assert ours.equal(expected_sum(expert, placement, whole, form, nodes)), (seed, expert)


@pytest.mark.ranks
@forms_and_nodes
@pytest.mark.parametrize("whole", [True, False], ids=["whole numbers", "in a fixed order"])
def test_gradients_of_all_copies_are_summed_at_home(ranks, whole, form, nodes):
    for seed in SEEDS:
        assert_sums(ranks(POSITIONS).run(reduced, seed, whole, form, nodes), seed, whole, form, nodes)


@pytest.mark.ranks
@pytest.mark.parametrize("form, nodes", [("packed", "one node"), ("two_level", "two nodes")])
@pytest.mark.parametrize("late", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 3, 0, 1)])
def test_what_arrives_first_does_not_count(ranks, late, form, nodes):
    assert_sums(ranks(POSITIONS).run(reduced, 2, False, form, nodes, late), 2, False, form, nodes)


def test_the_order_of_the_sums_above_shows():
    """The numbers are such that another order, or grouping, has other bits."""
    placement = placement_of(2)
    sums = [[expected_sum(expert, placement, False, form, "two nodes") for expert in range(7)]
            for form in FORMS]
    assert not torch.stack(sums[0]).equal(torch.stack(sums[1]))
    backwards = [fold(add, [gradient(expert, at, False) for at in reversed(placement.holders(expert))])
                 for expert in range(7)]
    assert not torch.stack(backwards).equal(torch.stack(sums[0]))


def both_products(seed: int, form: str, nodes: str) -> tuple[float, float]:
    """This rank's part of <spAG(x), y> and of <x, spRS(y)>."""
    placement, at = placement_of(seed), dist.get_rank()
    x = stack([weight(expert) for expert in placement.experts_of(at)], torch.float64).requires_grad_()
    slots = sparse_all_gather(x, here(placement, form, nodes), group())
    y = stack([weight(1000 + 10 * expert + at) for expert in placement.slots_of(at)], torch.float64)
    slots.backward(y)
    return (slots * y).sum().item(), (x * x.grad).sum().item()


@pytest.mark.ranks
@forms_and_nodes
def test_the_reduction_is_the_adjoint_of_the_gather(ranks, form, nodes):
    for seed in SEEDS:
        parts = ranks(POSITIONS).run(both_products, seed, form, nodes)
        gathered, reduced = (sum(part[side] for part in parts) for side in (0, 1))
        assert gathered == pytest.approx(reduced, rel=1e-12), seed


# --- bytes


def handed_over(seed: int, form: str, nodes: str) -> list[list[int]]:
    """Bytes that this position handed to all-to-alls for each other one: by the gather, by the reduction."""
    placement, at, original = placement_of(seed), dist.get_rank(), dist.all_to_all_single
    handed = [0] * POSITIONS

    def counted(output, message, received, sent, **rest):
        for to, rows in enumerate(sent):
            handed[to] += rows * message.shape[1] * message.element_size()
        return original(output, message, received, sent, **rest)

    sparse, found = here(placement, form, nodes), []
    dist.all_to_all_single = counted
    try:
        for post, rows in ((lambda rows: sparse.post_gather([rows], group()), placement.experts_of(at)),
                           (lambda rows: sparse.post_reduce(rows, group()), placement.copies_at(at))):
            handed[:] = [0] * POSITIONS
            post(stack([weight(expert) for expert in rows], torch.float32)).wait()
            found.append(list(handed))
    finally:
        dist.all_to_all_single = original
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nodes", NODES)
def test_the_bytes_handed_over_are_those_of_the_formula(ranks, form, nodes):
    topology = NODES[nodes]
    for seed in SEEDS:
        results = ranks(POSITIONS).run(handed_over, seed, form, nodes)
        for way, formula in enumerate((gather_bytes, reduce_bytes)):
            traffic = formula(form, placement_of(seed), topology, 4 * WIDTH)
            for at, handed in enumerate(result[way] for result in results):
                same = [topology.node_of(to) == topology.node_of(at) for to in range(POSITIONS)]
                assert handed[at] == 0
                own, others = (sum(nbytes for nbytes, inside in zip(handed, same) if inside == wanted)
                               for wanted in (True, False))
                assert (traffic.inside[at], traffic.between[at]) == (own, others), (seed, at)


# --- handles


@pytest.mark.ranks
@pytest.mark.parametrize("form", FORMS)
def test_a_handle_is_taken_once(ranks, form):
    assert ranks(POSITIONS).run(taken_twice, form) == [True] * POSITIONS


def taken_twice(form: str) -> bool:
    placement = LayerPlacement((0, 1, 2, 3), POSITIONS, ((0, 1), (0, 2), (0, 3)))
    handle = here(placement, form, "two nodes").post_gather([torch.ones(1, WIDTH)], group())
    handle.wait()
    try:
        handle.wait()
    except AssertionError:
        return True
    return False
