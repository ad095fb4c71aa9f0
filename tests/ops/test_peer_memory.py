"""Rows into the memory of peers, and signals: places, limits, schemas.

The kernels pass the same tests: test_bindings_on_host.py, and pytest -m gpu.
"""

import threading
import time

import pytest
import torch
from torch import Tensor

from moetrain.ops.extension import kernels_for
from moetrain.ops.peer_memory import SignalTimeout, await_signals, copy_rows, push_rows, put_signals
from tests.support.peer_rows import CASES


def areas_after(move, sent: list[int], there: list[int], width: int,
                shift: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The rows, and the areas that they were moved to, with room behind; shift: bytes off the alignment."""
    torch.manual_seed(sum(sent) + width)
    rows_NB = torch.randint(0, 250, (sum(sent), width), dtype=torch.uint8)
    areas = [torch.full(((begin + many + 2) * width + shift,), 255, dtype=torch.uint8)[shift:]
             for many, begin in zip(sent, there)]
    move(rows_NB, areas, sent, there)
    return rows_NB, areas


@pytest.mark.parametrize("shift", [0, 4, 1])
@pytest.mark.parametrize("move", [copy_rows, push_rows,
                                  lambda *parts: push_rows(*parts, first=len(parts[2]) - 1)])
@pytest.mark.parametrize("case", CASES)
def test_rows_come_to_their_places_and_nothing_else_is_written(case, move, shift):
    sent, there, width = CASES[case]
    rows_NB, areas = areas_after(move, sent, there, width, shift)
    for rows, area, begin in zip(rows_NB.split(sent), areas, there):
        expected = torch.full_like(area, 255)
        expected[begin * width:(begin + len(rows)) * width] = rows.flatten()
        assert area.equal(expected)


def test_signals_reach_every_pad_at_one_place():
    pads = [torch.zeros(6, dtype=torch.int64) for _ in range(3)]
    put_signals(pads, 4, 7)
    put_signals(pads[1:], 0, 2**40)
    assert [pad.tolist() for pad in pads] == [
        [0, 0, 0, 0, 7, 0], [2**40, 0, 0, 0, 7, 0], [2**40, 0, 0, 0, 7, 0]]


def test_it_ends_when_all_places_have_come_so_far():
    pad = torch.tensor([3, 0, 5, 4])
    await_signals(pad, [0, 2, 3], 3, 60.0, [10, 12, 13, 11], "rows")
    if kernels_for(pad):                                 # emulated kernels have no time of their own
        return
    def late() -> None:
        time.sleep(0.1)
        pad[1] = 3
    thread = threading.Thread(target=late)
    thread.start()
    await_signals(pad, [1, 2], 3, 60.0, [11, 12, 10], "rows")
    thread.join()
    assert pad[1] == 3


def test_who_does_not_come_is_named():
    pad = torch.tensor([3, 2, 5])
    with pytest.raises((SignalTimeout, RuntimeError)) as raised:
        await_signals(pad, [2, 1], 3, 0.05, [12, 11, 10], "its rows, dispatch 3 of this run, in layers.3.moe")
    if kernels_for(pad):
        assert ("rank 10 waited 50 ms for rank 11: its rows, dispatch 3 of this run, in layers.3.moe, epoch 3"
                in str(raised.value))
    else:
        assert raised.value.index == 1


@pytest.mark.parametrize("name, arguments", [
    ("push_rows_", (torch.ones(3, 8, dtype=torch.uint8),
                    [torch.zeros(40, dtype=torch.uint8) for _ in range(2)], [1, 2], [0, 1], 0)),
    ("put_signals_", ([torch.zeros(3, dtype=torch.int64) for _ in range(2)], 1, 5)),
    ("await_signals_", (torch.full((3,), 5), [0, 2], 5, 1000, [1, 2, 0], "rows")),
], ids=["rows", "put", "signals"])
def test_schemas_hold(name, arguments):
    torch.library.opcheck(getattr(torch.ops.moetrain, name).default, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    def on_gpu(rows_NB, areas, sent, there):
        there_areas = [area.cuda() for area in areas]
        push_rows(rows_NB.cuda(), there_areas, sent, there)
        for area, moved in zip(areas, there_areas):
            area.copy_(moved)
    for sent, there, width in CASES.values():
        _, expected = areas_after(copy_rows, sent, there, width)
        _, found = areas_after(on_gpu, sent, there, width)
        assert all(a.equal(b) for a, b in zip(expected, found))
    pads = [torch.zeros(4, dtype=torch.int64, device="cuda") for _ in range(2)]
    put_signals(pads, 2, 9)
    await_signals(pads[1], [2], 9, 5.0, [0, 1], "a test")
    assert pads[0].tolist() == [0, 0, 9, 0]
