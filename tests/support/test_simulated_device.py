"""The simulated device itself: what it refuses, what it permits, and which reads by the host it sees."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support import simulated_device

TWO_DEVICES = ("two devices", "same device", "is on cpu")


@pytest.fixture
def device(devices):
    return devices(1)


def refusals() -> dict[str, Callable[[], object]]:
    """Operations that CUDA refuses, by name."""
    x, host = torch.randn(4, 4, device="cuda"), torch.randn(4, 4)
    ids, host_ids = torch.tensor([1, 2], device="cuda"), torch.tensor([1, 2])
    b16 = torch.randn(4, 8, device="cuda", dtype=torch.bfloat16)
    stack = torch.randn(2, 8, 8, device="cuda", dtype=torch.bfloat16)
    return {
        "add": lambda: x + host,
        "add of one element": lambda: x + torch.ones(1),
        "in place": lambda: x.add_(host),
        "cat": lambda: torch.cat([x, host]),
        "stack": lambda: torch.stack([host, x]),
        "product": lambda: x @ host,
        "linear": lambda: F.linear(x, host),
        "addmm": lambda: torch.addmm(host, x, x),
        "index_select": lambda: x.index_select(0, host_ids),
        "gather": lambda: x.gather(1, torch.zeros(4, 4, dtype=torch.int64)),
        "scatter": lambda: x.scatter(1, torch.zeros(4, 4, dtype=torch.int64, device="cuda"), host),
        "where": lambda: torch.where(x > 0, x, host),
        "embedding": lambda: F.embedding(host_ids, x),
        "cross entropy": lambda: F.cross_entropy(x, torch.tensor([0, 1, 2, 3])),
        "host by an index of the device": lambda: host[ids],
        "grouped_mm with offsets of the host": lambda: F.grouped_mm(
            b16, stack, offs=torch.tensor([2, 4], dtype=torch.int32)),
        "out of the host": lambda: torch.add(x, x, out=torch.empty(4, 4)),
        "bucketize": lambda: torch.bucketize(host, x[0]),
        "index_add": lambda: x.index_add(0, host_ids, x[:2]),
        "addition of a row of the host": lambda: x.add_(host[0]),
        "embedding_bag": lambda: F.embedding_bag(ids[None], host),
        "foreach": lambda: torch._foreach_add([x], [host]),
        "numpy": lambda: x.numpy(),
        "asarray": lambda: np.asarray(x),
        "an ordinal that is not there": lambda: torch.empty(2, device="cuda:3"),
        "a product of integers": lambda: ids[:, None] @ ids[None],
        "a generator of the host": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    }


def permissions() -> dict[str, Callable[[], object]]:
    """Operations that CUDA allows although a tensor of the host takes part."""
    x = torch.randn(4, 4, device="cuda")
    return {
        "a number": lambda: x * 2 + 1,
        "a tensor without dimensions": lambda: x * torch.tensor(2.0),
        "an index of the host": lambda: x[torch.tensor([0, 2])],
        "a place by an index of the host": lambda: x.index_put_(
            (torch.tensor([1]),), torch.zeros(4, device="cuda")),
        "a mask of the host": lambda: x[torch.tensor([True, False, True, False])],
        "a copy": lambda: x.copy_(torch.ones(4, 4)),
        "where with a number": lambda: torch.where(x > 0, x, 0.0),
        "masked_fill": lambda: x.masked_fill(x > 0, 0.0),
        "a generator of the device": lambda: torch.randn(
            3, device="cuda", generator=torch.Generator(device="cuda")),
    }


def _outcomes(of: Callable[[], dict[str, Callable[[], object]]]) -> dict[str, str]:
    found = {}
    for name, operation in of().items():
        try:
            operation()
            found[name] = ""
        except (RuntimeError, TypeError, ValueError) as error:
            found[name] = str(error)
    return found


def _refused() -> dict[str, str]:
    return _outcomes(refusals)


def _permitted() -> dict[str, str]:
    return _outcomes(permissions)


def test_what_a_gpu_refuses_is_refused(device) -> None:
    (found,) = device.run(_refused)
    assert {name for name, error in found.items() if not error} == set()
    others = ("numpy", "asarray", "an ordinal that is not there", "a product of integers",
              "a generator of the host", "host by an index of the device")
    mixed = {name: error for name, error in found.items() if name not in others}
    assert {name: error for name, error in mixed.items()
            if not any(words in error for words in TWO_DEVICES)} == {}


def test_what_a_gpu_permits_is_permitted(device) -> None:
    (found,) = device.run(_permitted)
    assert {name: error for name, error in found.items() if error} == {}


def _arithmetic() -> dict[str, object]:
    torch.manual_seed(0)
    x, w = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)

    def both(device: str) -> tuple:
        a, b = x.clone().to(device).requires_grad_(), w.clone().to(device).requires_grad_()
        loss = (a @ b).softmax(-1).square().sum() + a[:, 1:].cumsum(0).relu().mean()
        loss.backward()
        return loss.detach(), a.grad, b.grad

    results = {"host": both("cpu"), "device": both("cuda")}
    leaf, threads = torch.ones(2, device="cuda", requires_grad=True), {threading.get_ident()}
    leaf.register_hook(lambda _: threads.add(threading.get_ident()))
    leaf.sum().backward()
    before = torch.cuda.memory_allocated()
    unwritten = torch.empty(3, device="cuda")
    view = unwritten[1:]
    versions = view._version, (view.fill_(2.0), view._version)[1]
    shared = unwritten.tolist()[1:]
    kept = torch.cuda.memory_allocated() - before
    del unwritten, view
    left = torch.cuda.memory_allocated() - before
    return {**results, "threads": len(threads), "versions": versions, "shared": shared, "kept": kept,
            "left": left, "nan": bool(torch.empty(3, device="cuda").isnan().all())}


def test_it_computes_what_the_cpu_does_and_counts_its_memory(device) -> None:
    (found,) = device.run(_arithmetic)
    for ours, theirs in zip(found["device"], found["host"], strict=True):
        assert ours.equal(theirs)
    assert found["threads"] == 2                             # backward runs in the device's own
    # A view shares memory and version.
    assert found["versions"] == (0, 1) and found["shared"] == [2.0, 2.0]
    assert found["kept"] == 12 and found["left"] == 0 and found["nan"]


def _hooked(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose gradient the host reads."""
    leaf = x.clone().requires_grad_()
    leaf.register_hook(lambda gradient: gradient[0].item() and None)
    return leaf * 2


def _reads() -> dict[str, dict[str, int]]:
    x, ids = torch.randn(4, device="cuda"), torch.tensor([0, 1, 1], device="cuda")
    pinned = torch.ones(4, pin_memory=True)
    operations: dict[str, Callable[[], object]] = {
        "item": lambda: x[0].item(), "tolist": lambda: x.tolist(), "bool": lambda: bool(x[0] > 0),
        "cpu": lambda: x.cpu(), "to the device": lambda: torch.ones(4).to("cuda"),
        "mask": lambda: x[x > 0], "nonzero": lambda: x.nonzero(),
        "bincount": lambda: ids.bincount(), "repeat_interleave": lambda: x[:3].repeat_interleave(ids),
        "synchronize": lambda: torch.cuda.synchronize(),
        "pageable": lambda: torch.ones(4).to("cuda", non_blocking=True),
        "int": lambda: [1, 2, 3][ids[0]], "range": lambda: range(int(ids.max())),
        "format": lambda: f"{x[0]:.2f}", "equal": lambda: torch.equal(x, x), "unique": lambda: ids.unique(),
        "masked_select": lambda: x.masked_select(x > 0),
        "a number into a place": lambda: x.__setitem__(0, 2.0),
        "an index of the host": lambda: x[torch.tensor([0, 1])],
        "the host's memory back": lambda: torch.empty(4).copy_(x),
        "event": lambda: torch.cuda.current_stream().record_event().synchronize(),
        "accelerator": lambda: torch.accelerator.synchronize(),
        "in backward": lambda: x.clone().requires_grad_().square().sum().backward(),
        "read in backward": lambda: _hooked(x).sum().backward(),
        "pinned": lambda: pinned.to("cuda", non_blocking=True), "arithmetic": lambda: (x * 2).sum(),
        "known size": lambda: x[:3].repeat_interleave(ids, output_size=2),
    }
    found = {}
    for name, operation in operations.items():
        simulated_device.RECORD.clear()
        operation()
        found[name] = {wait.kind: times for wait, times in simulated_device.RECORD.items()}
    return found


def test_every_read_by_the_host_is_recorded(device) -> None:
    (found,) = device.run(_reads)
    quiet = {"pinned", "arithmetic", "known size", "in backward"}
    assert {name for name, waits in found.items() if not waits} == quiet
    assert set(found["pageable"]) == {"copy to the device, may wait"}


def _outcomes_of_two(folder: Path) -> dict[str, str]:
    """What two ranks, each with a device, do with two devices and with groups."""
    rank = dist.get_rank()
    ours, its = torch.ones(2, device=f"cuda:{rank}"), torch.ones(2, device=f"cuda:{1 - rank}")
    symmetric = torch.distributed._symmetric_memory
    group, gloo = dist.group.WORLD, dist.new_group(backend="gloo")

    def onto_one_device() -> object:
        return symmetric.rendezvous(symmetric.empty(8, dtype=torch.uint8, device="cuda:0"), group.group_name)

    def barrier_of_a_group_without_a_device() -> None:
        bound, group.bound_device_id = group.bound_device_id, None
        with warnings.catch_warnings(record=True, action="always") as said:
            dist.barrier()
        group.bound_device_id = bound
        if said:
            raise RuntimeError(str(said[0].message))

    assert dist.get_backend() == "nccl"
    found = _outcomes(lambda: {
        "both devices": lambda: ours + its,
        "cat of both": lambda: torch.cat([ours, its]),
        "all_reduce of the host": lambda: dist.all_reduce(torch.ones(2)),
        "all_gather of the host": lambda: dist.all_gather_into_tensor(torch.empty(4), torch.ones(2)),
        "all_to_all of the host": lambda: dist.all_to_all_single(torch.empty(2), torch.ones(2)),
        "broadcast of the host": lambda: dist.broadcast(torch.ones(2), 0),
        "reduce_scatter into the host": lambda: dist.reduce_scatter_tensor(torch.empty(1), ours),
        "symmetric memory on one device": onto_one_device,
        "symmetric memory of torch.empty": lambda: symmetric.rendezvous(ours, group.group_name),
        "barrier without a device": barrier_of_a_group_without_a_device,
        "permitted: a copy to the other": lambda: its.copy_(ours),
        "permitted: all_reduce": lambda: dist.all_reduce(ours),
        "permitted: over gloo": lambda: dist.all_reduce(torch.ones(2), group=gloo),
    })
    assert ours.tolist() == [2.0, 2.0]
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="Duplicate GPU"):
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=2,
                                device_id=torch.device("cuda", 0))
    return found


def test_two_devices_and_their_groups(devices, tmp_path: Path) -> None:
    for rank, found in enumerate(devices(2).run(_outcomes_of_two, tmp_path)):
        permitted = {name for name, error in found.items() if not error}
        # torch warns on rank 0 alone.
        warned = {"barrier without a device"} if rank == 1 else set()
        assert permitted == {name for name in found if name.startswith("permitted")} | warned, found
