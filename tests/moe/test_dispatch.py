"""Tokens to experts and back: combine undoes dispatch, and two positions give what one gives."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.mesh import Group
from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import DispatchedRows, TokenDispatcher
from moetrain.moe.expert_form import SwigluExpert
from moetrain.moe.experts import RoutedExperts
from moetrain.ops.permute import gather_padded, permute
from moetrain.plan.placement import LayerPlacement, contiguous
from moetrain.routers.base import Routing

CPU, EXPERTS, WIDTH = torch.device("cpu"), 4, 3
# Expert ids of the tokens of two ranks.
IDS = {
    "mixed": ([[0, 3], [2, 1], [3, -1]], [[1, 0], [-1, -1]]),
    "one token each": ([[0, 3]], [[3, 2]]),
    "all to one expert": ([[3], [3], [3]], [[3]]),
    "a rank of padding": ([[-1, -1]], [[2, 0], [0, 1]]),
    "nothing at all": ([[-1]], [[-1], [-1]]),
    "odd slots": ([[0, 1, 2], [3, 2, -1]], [[1, -1, -1]]),
}
HOMES = {1: LayerPlacement((0,) * EXPERTS, 1), 2: contiguous(EXPERTS, 2)}
UNEVEN = LayerPlacement((1, 0, 1, 1), 2)


def routed(ids: list[list[int]], seed: int) -> tuple[Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.tensor(ids)
    x_TD = torch.randn(len(ids), WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    weights_TK = torch.rand(ids_TK.shape, dtype=torch.float64, generator=generator).requires_grad_()
    return x_TD, Routing(ids_TK, weights_TK, ids_TK.numel(), None)


def dispatcher(placement: LayerPlacement, exact: bool = False) -> TokenDispatcher:
    return TokenDispatcher(placement, FlatExchange(group(placement.positions)), CPU, exact=exact)


def group(positions: int) -> Group:
    return Group("ep", (0,), 0) if positions == 1 else Group("ep", (0, 1), dist.get_rank(), dist.group.WORLD)


def rows_of(sent: DispatchedRows) -> Tensor:
    """The rows as the experts read them, in expert order."""
    return permute(sent.x_ND, sent.order)


def experts(sent: DispatchedRows, ids: tuple[int, ...]) -> Tensor:
    """Expert e cubes a row, times e + 1, times the row's weight: not linear, not the same for two experts."""
    assert sum(sent.counts_e) == len(rows_of(sent)) == len(sent.weights_R)
    assert not any(sent.counts_e[len(ids):])                       # slots without an expert get no rows
    factor_R = torch.repeat_interleave(torch.tensor(ids, dtype=torch.float64) + 1,
                                       torch.tensor(sent.counts_e[:len(ids)]))
    return rows_of(sent) ** 3 * (factor_R * sent.weights_R)[:, None]


def through(placement: LayerPlacement, ids: list[list[int]], rank: int,
            exact: bool = False) -> tuple[Tensor, ...]:
    """Output, and the gradients of tokens and weights: the same bits where used slots are counted."""
    bounded, counted = (through_once(placement, ids, rank, exact, each) for each in (False, True))
    assert all(map(torch.equal, bounded, counted))
    return bounded


def through_once(placement: LayerPlacement, ids: list[list[int]], rank: int, exact: bool,
                 counted: bool) -> tuple[Tensor, ...]:
    x_TD, routing = routed(ids, seed=rank)
    moves = dispatcher(placement, exact)
    sent = moves.dispatch(x_TD, routing.ids_TK, routing.weights_TK, None if counted else routing.max_rows)
    held = placement.experts_of(moves.exchange.group.position)
    out_TD = moves.combine(experts(sent, held), sent.metadata)
    (out_TD * torch.arange(1.0, WIDTH + 1)).sum().backward()
    return out_TD.detach(), x_TD.grad, routing.weights_TK.grad


def by_loop(ids: list[list[int]], rank: int) -> tuple[Tensor, ...]:
    x_TD, routing = routed(ids, seed=rank)
    factor_TK = (routing.ids_TK + 1).double() * routing.weights_TK           # an unused slot: 0
    out_TD = x_TD ** 3 * factor_TK.sum(1, keepdim=True)
    (out_TD * torch.arange(1.0, WIDTH + 1)).sum().backward()
    return out_TD.detach(), x_TD.grad, routing.weights_TK.grad


def through_on_rank(placement: LayerPlacement, ids: list[list[list[int]]], exact: bool) -> tuple[Tensor, ...]:
    return through(placement, ids[dist.get_rank()], dist.get_rank(), exact)


def slots_on_rank(ids: list[list[list[int]]], exact: bool) -> Tensor:
    x_TD, routing = routed(ids[dist.get_rank()], seed=dist.get_rank())
    moves = dispatcher(HOMES[2], exact)
    sent = moves.dispatch(x_TD, routing.ids_TK, routing.weights_TK)
    return moves.combine(rows_of(sent), sent.metadata, reduce=False).detach()


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_one_position_gives_the_weighted_sum_of_a_plain_loop(ids):
    for rank in (0, 1):
        torch.testing.assert_close(through(HOMES[1], ids[rank], rank), by_loop(ids[rank], rank))


@pytest.mark.ranks
@pytest.mark.parametrize("placement", [HOMES[2], UNEVEN], ids=["contiguous", "uneven"])
@pytest.mark.parametrize("exact", [True, False], ids=["by slot", "by token"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_two_positions_give_what_one_gives(ranks, ids, placement, exact):
    for rank, result in enumerate(ranks(2).run(through_on_rank, placement, ids, exact)):
        torch.testing.assert_close(result, through(HOMES[1], ids[rank], rank))


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_rows_come_in_expert_order_and_unreduced_slots_undo_the_dispatch(ids):
    x_TD, routing = routed(ids[0], seed=0)
    moves = dispatcher(HOMES[1])
    sent = moves.dispatch(x_TD, routing.ids_TK, routing.weights_TK)
    used = sorted((id, token, slot) for token, row in enumerate(ids[0])
                  for slot, id in enumerate(row) if id >= 0)
    assert sent.counts_e == [sum(id == expert for id, _, _ in used) for expert in range(EXPERTS)]
    assert rows_of(sent).tolist() == [x_TD[token].tolist() for _, token, _ in used]
    assert sent.weights_R.tolist() == [routing.weights_TK[token, slot].item() for _, token, slot in used]
    slots_TKD = moves.combine(rows_of(sent), sent.metadata, reduce=False)
    assert slots_TKD.equal(x_TD[:, None] * (routing.ids_TK >= 0)[..., None])


@pytest.mark.ranks
@pytest.mark.parametrize("exact", [True, False], ids=["by slot", "by token"])
@pytest.mark.parametrize("ids", ["mixed", "odd slots", "a rank of padding"])
def test_unreduced_slots_undo_the_dispatch_over_two_positions(ranks, ids, exact):
    for rank, slots_TKD in enumerate(ranks(2).run(slots_on_rank, IDS[ids], exact)):
        x_TD, routing = routed(IDS[ids][rank], seed=rank)
        assert slots_TKD.equal(x_TD[:, None] * (routing.ids_TK >= 0)[..., None])


def test_a_placement_for_other_positions_is_refused():
    with pytest.raises(AssertionError):
        TokenDispatcher(HOMES[2], FlatExchange(Group("ep", (0,), 0)), CPU)


# --- counts that stay on the device


def layer_with_counts(on_device: bool, positions: int, ids: list[list[list[int]]], exact: bool,
                      max_rows: int | None = 100) -> tuple[Tensor, ...]:
    """Output and every gradient of the experts here."""
    placement, rank = HOMES[positions], 0 if positions == 1 else dist.get_rank()
    ids_TK, dtype = torch.tensor(ids[rank]), torch.float32
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(len(ids_TK), 8, generator=generator).to(dtype).requires_grad_()
    weights_TK = torch.rand(ids_TK.shape, generator=generator).requires_grad_()
    bank = ExpertBank(experts=placement.experts_of(rank), form=SwigluExpert(dim=8, expert_dim=16))
    for matrix in bank.parameters():
        torch.nn.init.normal_(matrix, generator=generator)
    dispatcher = TokenDispatcher(placement, FlatExchange(group(positions)), CPU, exact=exact,
                                 on_device=on_device)
    out_TD = RoutedExperts(bank, dispatcher)(x_TD, ids_TK, weights_TK.where(ids_TK >= 0, 0),
                                             max_rows).wait()
    (out_TD ** 2).sum().backward()
    return out_TD.detach(), x_TD.grad, weights_TK.grad, bank.gate_up.grad, bank.down.grad


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_counts_on_the_device_give_what_counts_on_the_host_give(ids):
    for turned in (ids, ids[::-1]):
        used = sum(id >= 0 for row in turned[0] for id in row)
        theirs = layer_with_counts(False, 1, turned, False)
        for max_rows in (100, used, None):               # all slots; a bound that is just met; counted
            ours = layer_with_counts(True, 1, turned, False, max_rows)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        if used:
            with pytest.raises(RuntimeError, match=f"more used slots than max_rows = {used - 1}"):
                layer_with_counts(True, 1, turned, False, used - 1)


@pytest.mark.ranks
@pytest.mark.parametrize("exact", [True, False], ids=["by slot", "by token"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_counts_on_the_device_give_the_same_over_two_positions(ranks, ids, exact):
    ours, theirs = (ranks(2).run(layer_with_counts, on_device, 2, ids, exact) for on_device in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_device", [True, False])
def test_nothing_asks_the_device_for_a_number(on_device):
    """Fake tensors have no values: whoever wants one is refused."""
    with FakeTensorMode():
        ids_TK = torch.zeros(5, 2, dtype=torch.int64)
        x_TD, weights_TK = torch.randn(5, 8).requires_grad_(), torch.rand(5, 2).requires_grad_()
        bank = ExpertBank(experts=tuple(range(EXPERTS)), form=SwigluExpert(dim=8, expert_dim=16))
        dispatcher = TokenDispatcher(HOMES[1], FlatExchange(Group("ep", (0,), 0)), CPU, on_device=on_device)
        try:
            RoutedExperts(bank, dispatcher)(x_TD, ids_TK, weights_TK,
                                            ids_TK.numel()).wait().sum().backward()
        except (DataDependentOutputException, DynamicOutputShapeException):
            assert not on_device
        else:
            assert on_device and bank.gate_up.grad.shape == bank.gate_up.shape


def test_unreduced_slots_of_padded_rows_undo_the_dispatch():
    x_TD, routing = routed(IDS["mixed"][0], seed=0)
    x_TD, routing = x_TD.float(), routing._replace(weights_TK=routing.weights_TK.float())
    moves = TokenDispatcher(HOMES[1], FlatExchange(Group("ep", (0,), 0)), CPU, on_device=True)
    sent = moves.dispatch(x_TD, routing.ids_TK, routing.weights_TK)
    slots_TKD = moves.combine(gather_padded(sent.x_ND, *sent.order[:2]), sent.metadata, reduce=False)
    assert slots_TKD.equal(x_TD[:, None] * (routing.ids_TK >= 0)[..., None])
