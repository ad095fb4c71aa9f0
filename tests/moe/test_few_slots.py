"""K = E at the price of the slots that are used: memory, rows and messages, and the same bits."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.mesh import Group
from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import TokenDispatcher, used_columns
from moetrain.moe.expert_form import SwigluExpert
from moetrain.moe.experts import RoutedExperts
from moetrain.plan.placement import contiguous

MEAN = 8                     # used slots of a token


def routing(tokens: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Experts [T, E] and gate weights of tokens that use MEAN of all experts on average; the first none."""
    generator = torch.Generator().manual_seed(seed)
    used_T = torch.poisson(torch.full((tokens,), float(MEAN)), generator=generator)
    used_T[0] = 0
    used_TK = torch.arange(experts) < used_T[:, None]
    order_TK = torch.rand(tokens, experts, generator=generator).argsort(1)
    return order_TK.where(used_TK, -1), torch.rand(tokens, experts, generator=generator).where(used_TK, 0)


def peak_bytes(tokens: int, experts: int, chunks: int, fixed: bool, width: int = 64) -> int:
    """Peak of torch's own account of dispatch, experts and combine, forward and backward, on this rank.

    `fixed`: every token uses exactly MEAN of MEAN slots: as many rows, and no slot to spare.
    """
    rank, positions = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    group = Group("ep", tuple(range(positions)), rank, dist.group.WORLD if positions > 1 else None)
    placement = contiguous(experts, positions)
    bank = ExpertBank(experts=placement.experts_of(rank), form=SwigluExpert(dim=width, expert_dim=width))
    for matrix in bank.parameters():
        torch.nn.init.normal_(matrix, std=0.1)
    layer = RoutedExperts(bank, TokenDispatcher(placement, FlatExchange(group), torch.device("cpu")), chunks)
    ids_TK, weights_TK = routing(tokens, experts, rank)
    if fixed:
        ids_TK = torch.rand(tokens, experts).argsort(1)[:, :MEAN].contiguous()
        weights_TK = torch.rand(tokens, MEAN)
    x_TD = torch.randn(tokens, width).requires_grad_()
    weights_TK.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer(x_TD, ids_TK, weights_TK, ids_TK.numel() if fixed else None).wait().sum().backward()
    changes = sorted((event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
                     if event.name() == "[memory]")
    held = torch.tensor([size for _, size in changes]).cumsum(0)
    return int(held.max())


@pytest.mark.parametrize("tokens, experts", [
    (2048, 128), pytest.param(16384, 256, marks=pytest.mark.full)])
def test_memory_is_that_of_the_used_slots(tokens, experts):
    assert peak_bytes(tokens, experts, 1, False, 16) / peak_bytes(tokens, experts, 1, True, 16) < 1.2


@pytest.mark.ranks
@pytest.mark.parametrize("tokens, experts, chunks", [
    (1024, 128, 1), pytest.param(16384, 256, 1, marks=pytest.mark.full),
    pytest.param(16384, 256, 4, marks=pytest.mark.full)])
def test_memory_is_that_of_the_used_slots_where_rows_are_exchanged(ranks, tokens, experts, chunks):
    few, fixed = (ranks(2).run(peak_bytes, tokens, experts, chunks, fixed) for fixed in (False, True))
    assert max(few) / max(fixed) < 1.2


def outcome(counted: bool, exact: bool, chunks: int) -> tuple[list[Tensor], list[int]]:
    """Output and gradients on this rank of two, and the sizes of the messages of rows, in bytes."""
    rank, experts = dist.get_rank(), 32
    group, placement = Group("ep", (0, 1), rank, dist.group.WORLD), contiguous(experts, 2)
    bank = ExpertBank(experts=placement.experts_of(rank), form=SwigluExpert(dim=8, expert_dim=8)).double()
    for number, matrix in enumerate(bank.parameters()):
        torch.nn.init.normal_(matrix, generator=torch.Generator().manual_seed(10 * rank + number))
    dispatcher = TokenDispatcher(placement, FlatExchange(group), torch.device("cpu"), exact=exact)
    sizes, start = [], dispatcher.exchange.start
    dispatcher.exchange.start = lambda message, *rest, **kind: (
        sizes.append(message.nbytes), start(message, *rest, **kind))[1]
    ids_TK, weights_TK = routing(41 - 20 * rank, experts, rank)
    if rank == 0:
        ids_TK[3] = torch.arange(experts)                # a token that uses all of them
    x_TD = torch.randn(len(ids_TK), 8, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(rank)).requires_grad_()
    weights_TK = weights_TK.double().requires_grad_()
    layer = RoutedExperts(bank, dispatcher, chunks)
    out_TD = layer(x_TD, ids_TK, weights_TK, None if counted else ids_TK.numel()).wait()
    (out_TD ** 2).sum().backward()
    grads = [matrix.grad for matrix in bank.parameters()]
    return [out_TD.detach(), x_TD.grad, weights_TK.grad, *grads], sizes


@pytest.mark.ranks
@pytest.mark.parametrize("exact", [True, False], ids=["by slot", "by token"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_counting_used_slots_changes_no_bit_and_sends_less(ranks, exact, chunks):
    counted, bounded = (ranks(2).run(outcome, counted, exact, chunks) for counted in (True, False))
    for (ours, less), (theirs, all_slots) in zip(counted, bounded, strict=True):
        assert all(map(torch.equal, ours, theirs)) and all(tensor.any() for tensor in ours)
        assert sum(less) < 0.9 * sum(all_slots) if not exact and chunks > 1 else sum(less) <= sum(all_slots)


def test_columns_that_no_token_uses_are_cut_off():
    ids = [torch.tensor([[4, -1, -1, -1], [2, 0, -1, -1]]), torch.full((3, 4), -1),
           torch.empty(0, 4, dtype=torch.int64), torch.tensor([[0, 1, 2, 3]]),
           torch.tensor([[-1, 1, -1, -1]])]                      # out of order: kept, at a price
    found, rows = used_columns(ids)
    assert rows == [3, 0, 0, 4, 1]
    assert [ids_TK.shape[1] for ids_TK in found] == [2, 1, 1, 4, 2]
    assert all(short.equal(ids_TK[:, :short.shape[1]]) for short, ids_TK in zip(found, ids))
