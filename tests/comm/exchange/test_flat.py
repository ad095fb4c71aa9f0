"""Flat exchange on real ranks: rows arrive bit for bit, and gradients go back the way they came."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.exchange.async_exchange import pack, unpack
from moetrain.comm.exchange.base import Splits
from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.mesh import Group

# Rows from each position to each. In the first of each size the last rank sends and receives nothing.
TRAFFIC = {
    2: [[[3, 0], [0, 0]], [[1, 2], [4, 0]], [[0, 3], [1, 0]], [[0, 0], [0, 0]]],
    4: [[[2, 1, 0, 0], [0, 3, 5, 0], [1, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 7]] * 4,
        [[1, 0, 2, 1], [0, 0, 0, 3], [2, 2, 1, 0], [1, 4, 0, 0]]],
}
CASES = [(size, traffic) for size, cases in TRAFFIC.items() for traffic in cases]
WIDTH = 4


def flat_exchange() -> FlatExchange:
    world, rank = dist.get_world_size(), dist.get_rank()
    return FlatExchange(Group("ep", tuple(range(world)), rank, dist.group.WORLD))


def splits_of(traffic: list[list[int]], rank: int) -> Splits:
    return Splits(tuple(traffic[rank]), tuple(row[rank] for row in traffic))


def sent_by(rank: int, traffic: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank sends: bfloat16 rows, float32 weights, float32 blocks; NaN and -0 among them."""
    generator = torch.Generator().manual_seed(rank)
    rows = sum(traffic[rank])
    x_RD = torch.randn(rows, WIDTH, generator=generator).bfloat16()
    weights_R = torch.randn(rows, generator=generator)
    blocks = torch.randn(rows, 2, 3, generator=generator)
    if rows:
        x_RD[0, 0], weights_R[-1] = -0.0, torch.nan
    return x_RD, weights_R, blocks


def expected_at(rank: int, traffic: list[list[int]], of) -> Tensor:
    """Rows for this rank, by source: of(source) are the rows that source sends."""
    return torch.cat([of(source).split(traffic[source])[rank] for source in range(len(traffic))])


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def rows_arrive_by_source(traffic: list[list[int]]) -> None:
    rank = dist.get_rank()
    received = flat_exchange().post(sent_by(rank, traffic), splits_of(traffic, rank)).wait()
    for index, tensor in enumerate(received):
        truth = expected_at(rank, traffic, lambda source: sent_by(source, traffic)[index])
        assert tensor.dtype == truth.dtype and tensor.shape == truth.shape and bits(tensor) == bits(truth)
    (alone,) = flat_exchange().post(sent_by(rank, traffic)[:1], splits_of(traffic, rank)).wait()
    assert bits(alone) == bits(received[0])


def gradients_go_back(traffic: list[list[int]]) -> None:
    """The gradient of what came from a rank is sent to it: the exchange with its splits reversed."""
    rank = dist.get_rank()

    def gradient(receiver: int) -> Tensor:
        count = sum(row[receiver] for row in traffic)
        return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(100 + receiver))

    x_RD, weights_R, _ = sent_by(rank, traffic)
    x_RD, weights_R = x_RD.float().requires_grad_(), weights_R.requires_grad_()
    got_RD, got_R = flat_exchange().post((x_RD, weights_R), splits_of(traffic, rank)).wait()
    grad_R = gradient(rank)[:, 0].clone(memory_format=torch.contiguous_format)
    torch.autograd.backward((got_RD, got_R), (gradient(rank), grad_R))
    transposition = [list(row) for row in zip(*traffic)]
    truth = expected_at(rank, transposition, gradient)
    assert torch.equal(x_RD.grad, truth) and torch.equal(weights_R.grad, truth[:, 0])


def one_result_may_go_unused() -> None:
    traffic = [[1, 2], [0, 1]]
    x_RD, weights_R, _ = sent_by(dist.get_rank(), traffic)
    x_RD, weights_R = x_RD.requires_grad_(), weights_R.requires_grad_()
    rows_RD, _ = flat_exchange().post((x_RD, weights_R), splits_of(traffic, dist.get_rank())).wait()
    rows_RD.sum().backward()
    assert torch.equal(x_RD.grad, torch.ones_like(x_RD)) and not weights_R.grad.any()


def two_in_flight_do_not_mix() -> None:
    rank, traffic = dist.get_rank(), [[1, 2], [3, 1]]
    x_RD = sent_by(rank, traffic)[0].float().requires_grad_()
    splits, exchange = splits_of(traffic, rank), flat_exchange()
    first, second = exchange.post((x_RD,), splits), exchange.post((2 * x_RD,), splits)
    (one,), (two,) = first.wait(), second.wait()
    assert torch.equal(two, 2 * one)
    (one.sum() + 3 * two.sum()).backward()
    assert torch.equal(x_RD.grad, torch.full_like(x_RD, 7))


def counts_are_transposed() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.arange(world * world * 3).view(world, world, 3)             # [source, destination, slot]
    assert torch.equal(flat_exchange().counts(whole[rank].contiguous()), whole[:, rank])


@pytest.mark.ranks
@pytest.mark.parametrize("size, traffic", CASES, ids=str)
def test_rows_of_several_dtypes_arrive_bit_for_bit_by_source(ranks, size, traffic):
    ranks(size).run(rows_arrive_by_source, traffic)


@pytest.mark.ranks
@pytest.mark.parametrize("size, traffic", CASES, ids=str)
def test_the_gradient_is_the_transposed_exchange_on_every_rank(ranks, size, traffic):
    ranks(size).run(gradients_go_back, traffic)


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 4])
def test_counts_are_swapped_by_position(ranks, size):
    ranks(size).run(counts_are_transposed)


@pytest.mark.ranks
def test_a_result_that_no_loss_uses_sends_zeros_back(ranks):
    ranks(2).run(one_result_may_go_unused)


@pytest.mark.ranks
def test_exchanges_in_flight_together_keep_apart(ranks):
    ranks(2).run(two_in_flight_do_not_mix)


def test_a_group_of_one_hands_its_rows_back():
    exchange = FlatExchange(Group("ep", (0,), 0))
    x_RD, counts = torch.randn(3, 2), torch.tensor([[1, 2]])
    assert exchange.post((x_RD,), Splits((3,), (3,))).wait()[0] is x_RD and exchange.counts(counts) is counts


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_unpack_undoes_pack(rows, dtypes):
    round_trip(rows, WIDTH, dtypes)


@pytest.mark.parametrize("rows", [0, 1])
def test_unpack_undoes_pack_at_odd_widths(rows):
    round_trip(rows, 3, (torch.bfloat16, torch.float32))


def test_pack_takes_a_row_of_any_stride():
    column = torch.randn(1, 4)[:, 0]
    assert pack((torch.randn(1, 4), column)).shape == (1, 20)


def round_trip(rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    tensors = torch.randn(rows, width).to(dtypes[0]), torch.randn(rows).to(dtypes[1])
    message = pack(tensors)
    assert message.shape == (rows, width * dtypes[0].itemsize + dtypes[1].itemsize)
    for back, sent in zip(unpack(message, [(t.dtype, t.shape[1:]) for t in tensors]), tensors, strict=True):
        assert back.dtype == sent.dtype and torch.equal(back, sent)
