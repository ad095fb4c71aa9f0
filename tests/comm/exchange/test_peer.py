"""The peer exchange among virtual ranks: threads of this process with real buffers and real pads.

Ordering, parity, offsets, growth and time limits of the protocol. That it moves between processes what the
flat exchange moves is tested in test_backends.py.
"""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from moetrain.comm.exchange.base import Splits, read_splits
from moetrain.comm.exchange.peer import NUM_BUFFERS, NUM_SIGNALS, PeerChannels, PeerExchange
from moetrain.comm.exchange.shared_buffers import SharedBuffers
from moetrain.errors import PeerError

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]


class Machine:
    """Memory that the threads of virtual ranks share, and a swap of integers among them."""

    def __init__(self, size: int, device: str) -> None:
        self.size, self.barrier, self.board = size, threading.Barrier(size), [None] * size
        self.device = torch.device(device)

    def exchange(self, position: int, mine) -> list:
        self.board[position] = mine
        self.barrier.wait()
        all_of_them = list(self.board)
        self.barrier.wait()
        return all_of_them

    def buffers(self, position: int) -> SharedBuffers:
        ranks = [10 + p for p in range(self.size)]
        return SharedBuffers(position, ranks, NUM_BUFFERS, NUM_SIGNALS,
                             lambda size: self.share(position, size), self.device)

    def share(self, position: int, size: int) -> list[Tensor]:
        mine = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()    # zeros are there before another rank's stream writes
        return self.exchange(position, mine)


class Board:
    """The exchange for counts."""

    def __init__(self, machine: Machine, position: int) -> None:
        self.machine, self.positions, self.position = machine, machine.size, position

    def counts(self, sent_P: Tensor) -> Tensor:
        boards = self.machine.exchange(self.position, sent_P.cpu())
        return torch.stack([sent[self.position] for sent in boards])


def splits_of(exchange: PeerExchange, sent: list[list[int]], received: list[list[int]]) -> list[Splits]:
    sent_CP = torch.tensor(sent)
    return read_splits(exchange, sent_CP, torch.tensor(received), sent_CP[:, :0])[0]


def on_threads(size: int, function, *arguments, limit_s: float = 120.0, push: bool = False,
               device: str = "cpu") -> list:
    """function(exchange, *arguments) on every virtual rank; results by rank."""
    machine = Machine(size, device)

    def run(position: int):
        with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
            peers = PeerChannels(machine.buffers(position), limit_s, push=push)
            return function(PeerExchange(Board(machine, position), peers, "layers.3.moe"), *arguments)

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(run, position) for position in range(size)]]


def traffic(size: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.choice([0, 0, 1, 2, 7, 30 * (seed % 3)]) for _ in range(size)] for _ in range(size)]


def stamped(source: int, number: int, rows: list[int], width: int) -> Tensor:
    """Rows that say where they come from, where they go, and which they are."""
    return torch.tensor([[source, to, number, row] + [0] * width
                         for to, many in enumerate(rows) for row in range(many)],
                        dtype=torch.int32).view(-1, 4 + width)


def many_exchanges(exchange: PeerExchange, seed: int, count: int) -> None:
    """There and back, two of each under way as with chunks, at random speeds; sizes that grow and shrink."""
    me, draw, size = exchange.position, random.Random(f"{seed}/{exchange.position}"), exchange.positions
    plans = [traffic(size, seed + number) for number in range(count)]
    transposition = [[list(row) for row in zip(*plan)] for plan in plans]
    splits = splits_of(exchange, [plan[me] for plan in plans], [plan[me] for plan in transposition])

    def send(number: int):
        message = stamped(me, number, plans[number][me], number % 3), torch.ones(sum(plans[number][me]))
        device = exchange.peers.buffers.device
        return exchange.post(tuple(part.to(device) for part in message), splits[number])

    on_way, returning = send(0), None
    for number in range(count):
        following = send(number + 1) if number + 1 < count else None
        time.sleep(draw.choice([0, 0, 0, 2e-3]))
        rows, ones = on_way.wait()
        sent = [stamped(source, number, plans[number][source], number % 3).split(plans[number][source])[me]
                for source in range(size)]
        assert rows.cpu().equal(torch.cat(sent)), number
        assert ones.cpu().equal(torch.ones(len(rows)))
        on_send_stream = exchange.post((rows,), splits[number].reversed(), read=False)
        if returning is not None:
            came_back(exchange, returning, plans, number - 1)
        on_way, returning = following, on_send_stream
    came_back(exchange, returning, plans, count - 1)


def came_back(exchange: PeerExchange, handle, plans, number: int) -> None:
    (rows,) = handle.wait()
    me = exchange.position
    assert rows.cpu().equal(stamped(me, number, plans[number][me], number % 3)), number


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize("size, seed", [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)])
def test_rows_of_many_exchanges_keep_apart_at_any_speed(size, seed, push, device):
    on_threads(size, many_exchanges, seed, 24, push=push, device=device)


@pytest.mark.ranks
@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize("size, seed", [
    pytest.param(1, 0, marks=pytest.mark.full), (2, 1), pytest.param(3, 2, marks=pytest.mark.full),
    pytest.param(5, 4, marks=pytest.mark.full)])
def test_rows_of_many_exchanges_keep_apart_on_a_simulated_device(size, seed, push, devices):
    devices(1).run(partial(on_threads, size, many_exchanges, seed, 24, push=push, device="cuda"))


def dawdle(exchange: PeerExchange, silent: str) -> str:
    """Rank 12 takes part in the first two exchanges, and then does not send or does not take."""
    splits = splits_of(exchange, [[1] * 3] * 8, [[1] * 3] * 8)
    message = torch.ones(3, 4)
    try:
        for number in range(8):
            if exchange.position == 2 and number == 2 and silent == "sends":
                return ""
            handle = exchange.post((message,), splits[number])
            if exchange.position == 2 and number == 2:
                return ""
            handle.wait()
    except PeerError as error:
        return str(error)
    return "ended"


@pytest.mark.parametrize("push", [False, True])
def test_a_rank_that_does_not_send_is_named(push):
    first, second, silent = on_threads(3, dawdle, "sends", limit_s=2.0, push=push)
    assert silent == ""
    for rank, error in ((10, first), (11, second)):
        assert error.startswith("E-PEER-003") and f"rank {rank} waited 2 s for the rows of rank 12" in error
        assert "dispatch 3 of this run, in layers.3.moe" in error and "log/rank-12.log" in error


def hold(exchange: PeerExchange) -> str:
    """Rank 1 sends and never takes; rank 0 takes all and goes on sending."""
    (splits,) = splits_of(exchange, [[1, 1]], [[1, 1]])
    peers, message = exchange.peers, torch.ones(2, 4)
    try:
        for number in range(5):
            plan = splits.backend_plan
            epoch = peers.send(message, splits.sent, plan.there, plan.max_rows_there, 0, exchange.name)
            if exchange.position == 1 and number == 1:
                return ""
            if exchange.position == 0 and number < 2:
                peers.receive(torch.empty(2, 4), 0, epoch, exchange.name)
    except PeerError as error:
        return str(error)
    return "ended"


@pytest.mark.parametrize("push", [False, True])
def test_a_rank_that_does_not_take_is_named(push):
    error, _ = on_threads(2, hold, limit_s=2.0, push=push)
    assert error.startswith("E-PEER-004") and "rank 10 waited 2 s until rank 11 had taken rows" in error


def three_at_once(exchange: PeerExchange) -> None:
    splits = splits_of(exchange, [[1]] * 3, [[1]] * 3)
    for number in range(3):
        exchange.post((torch.ones(1, 2),), splits[number])


def test_a_third_exchange_on_a_channel_is_a_mistake():
    with pytest.raises(AssertionError, match="under way"):
        on_threads(1, three_at_once)
