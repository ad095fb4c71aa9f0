"""Overlap: what is on its way while experts compute, both ways, and that chunks change nothing."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.mesh import Group
from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.expert_form import SwigluExpert
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.overlap import chunk_sizes
from moetrain.plan.placement import contiguous

EXPERTS, WIDTH, TOKENS = 4, 8, 11


class Trace(TorchDispatchMode):
    """Order in which rows are exchanged and experts run.

    In backward, a chunk is known by its activation, the gradients of weights by the sort of all chunks' rows.
    """

    NAMES = {"all_to_all_single_unread": "back", "all_to_all_single": "rows", "wait_tensor": "wait",
             "grouped_experts_backward": "experts'", "silu_backward": "experts'",
             "grouped_experts": "experts", "aten.sort": "weights"}

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = next((short for name, short in self.NAMES.items() if name in str(func)), None)
        if name and (name == "weights" or args[0].dtype != torch.int64):
            self.events.append(name)
        return func(*args, **(kwargs or {}))


def layer(chunks: int, exact: bool) -> RoutedExperts:
    group = Group("ep", (0, 1), dist.get_rank(), dist.group.WORLD)
    placement = contiguous(EXPERTS, 2)
    bank = ExpertBank(experts=placement.experts_of(group.position),
                      form=SwigluExpert(dim=WIDTH, expert_dim=WIDTH)).double()
    for matrix in bank.parameters():
        torch.nn.init.normal_(matrix, generator=torch.Generator().manual_seed(group.position))
    dispatcher = TokenDispatcher(placement, FlatExchange(group), torch.device("cpu"), exact=exact)
    return RoutedExperts(bank, dispatcher, chunks)


def tokens(number: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    ids_TK = torch.rand(number, EXPERTS, generator=generator).argsort(dim=1)[:, :2]
    x_TD = torch.randn(number, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    return x_TD, ids_TK, torch.rand(number, 2, dtype=torch.float64, generator=generator).requires_grad_()


def traced(chunks: int) -> tuple[list[str], list[str]]:
    experts = layer(chunks, exact=False)
    x_TD, ids_TK, weights_TK = tokens(TOKENS)
    with Trace() as forward:
        out_TD = experts(x_TD, ids_TK, weights_TK, read=False).wait()
    with Trace() as backward:
        out_TD.sum().backward()
    return [event for event in forward.events if event != "weights"], backward.events


def outcome(chunks: int, exact: bool, tokens_here: tuple[int, int]) -> list[Tensor]:
    experts = layer(chunks, exact)
    x_TD, ids_TK, weights_TK = tokens(tokens_here[dist.get_rank()])
    out_TD = experts(x_TD, ids_TK, weights_TK).wait()
    (out_TD ** 2).sum().backward()
    return [out_TD.detach(), x_TD.grad, weights_TK.grad,
            *(parameter.grad for parameter in experts.parameters())]


def remote_rows(chunks: int, exact: bool) -> tuple[int, int]:
    """(sent, expected) of one forward pass."""
    experts = layer(chunks, exact)
    x_TD, ids_TK, weights_TK = tokens(TOKENS)
    experts(x_TD, ids_TK, weights_TK).wait()
    away_TK = ids_TK // (EXPERTS // 2) != dist.get_rank()
    return experts.dispatcher.remote_rows, int(away_TK.sum() if exact else away_TK.any(1).sum())


@pytest.mark.ranks
@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_the_next_chunk_is_on_its_way_while_one_is_computed(ranks, chunks):
    """The exchange of the next chunk is posted before the experts of a chunk run, in forward and backward.

    What is posted right after them is waited for only after the next experts. Both hold on every rank.
    """
    for forward, backward in ranks(2).run(traced, chunks):
        for events, to, run, fro in ((forward, "rows", "experts", "back"),
                                     (backward, "rows", "experts'", "rows")):
            posted = [event for event in events if event not in ("wait", "weights")]
            middle = [run, fro, to] * (chunks - 2) + [run, fro] * min(2, chunks)
            assert posted == [to] * min(2, chunks) + middle, posted
        if chunks > 1:
            assert (forward[:4] == ["rows", "rows", "wait", "experts"]
                    and backward[:4] == ["rows", "rows", "wait", "experts'"])
            # Both under the gradients of weights
            assert backward[-4:] == ["rows", "weights", "wait", "wait"]


@pytest.mark.ranks
@pytest.mark.parametrize("tokens_here", [(11, 11), (3, 0), (1, 7)], ids=str)
def test_chunks_and_forms_of_rows_change_nothing(ranks, tokens_here):
    expected = ranks(2).run(outcome, 1, True, tokens_here)
    for chunks, exact in ((1, False), (2, False), (4, False), (4, True), (9, False)):
        for ours, theirs in zip(ranks(2).run(outcome, chunks, exact, tokens_here), expected):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.ranks
def test_chunks_give_the_same_bits_every_time(ranks):
    first, second = (ranks(2).run(outcome, 3, False, (11, 6)) for _ in range(2))
    for ours, again in zip(first, second):
        assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


@pytest.mark.ranks
@pytest.mark.parametrize("exact", [True, False])
def test_rows_sent_are_counted(ranks, exact):
    for chunks in (1, 3):
        for sent, expected in ranks(2).run(remote_rows, chunks, exact):
            assert sent == expected


@pytest.mark.parametrize("tokens, chunks, sizes",
                         [(8, 2, [4, 4]), (7, 3, [2, 2, 3]), (2, 4, [0, 1, 0, 1]), (0, 2, [0, 0]),
                          (5, 1, [5])])
def test_chunks_are_as_equal_as_may_be(tokens, chunks, sizes):
    assert chunk_sizes(tokens, chunks) == sizes
