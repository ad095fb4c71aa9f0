"""Ranks for tests: n processes joined by gloo on this machine, started once per world size for many cases.

    with Ranks(4) as ranks:
        results = ranks.run(function, *arguments)      # function(*arguments) on every rank; results by rank

`function` must be importable (a module-level name). The first failure is raised again here, with its
traceback and rank; a rank that does not answer within the limit is named.
"""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

LIMIT_S = 240
AFTER_FAILURE_S = 5


class Ranks:
    """Processes that run functions as the ranks of one world.

    Args:
        size: number of ranks.
        lasting: one process group for all tasks, for libraries that keep groups themselves; otherwise each
            task has its own.
        simulated: every rank has a CUDA device in host memory, and nccl (tests/support/simulated_device).
    """

    def __init__(self, size: int, *, lasting: bool = False, simulated: bool = False) -> None:
        self.size = size
        # Ranks are forked from one process that has imported what they need. A simulated device has to be
        # there before the package is imported.
        context = multiprocessing.get_context("spawn" if simulated or lasting else "forkserver")
        context.set_forkserver_preload(
            ["pytest", "torch._dynamo", "moetrain.train.loop", "tests.support.training"])
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, daemon=True,
                                      args=(rank, size, port, theirs, lasting, simulated))
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = self._collect()
        failures = [f"rank {rank}:\n{error}" for rank, (error, _) in sorted(results.items()) if error]
        missing = [rank for rank in range(self.size) if rank not in results]
        if missing:
            self.close(kill=True)
            failures.append(f"ranks {missing} of {self.size} did not answer in time")
        if failures:
            raise AssertionError("\n".join(failures))
        return [results[rank][1] for rank in range(self.size)]

    def _collect(self) -> dict[int, tuple[str, Any]]:
        """Answers of the ranks; after a failure the others get a few seconds, since they may wait for it."""
        deadline, results = time.monotonic() + LIMIT_S, {}
        while len(results) < self.size and time.monotonic() < deadline:
            waiting = {self.pipes[rank]: rank for rank in range(self.size) if rank not in results}
            for pipe in multiprocessing.connection.wait(list(waiting), timeout=1):
                results[waiting[pipe]] = pipe.recv()
                if results[waiting[pipe]][0]:
                    deadline = min(deadline, time.monotonic() + AFTER_FAILURE_S)
        return results

    def close(self, *, kill: bool = False) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(30)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _on_host(result: Any) -> Any:
    """Move the tensors of a result to the host: those of a device cannot be sent."""
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, lambda tensor: tensor.cpu(), result)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, size: int, port: int, pipe: Any, lasting: bool, simulated: bool) -> None:
    import torch
    import torch.distributed as dist

    if simulated:
        from tests.support import simulated_device

        simulated_device.install(devices=size)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    for number in itertools.count():
        if simulated:
            torch.cuda.set_device(rank)              # a task may have chosen another
        # Every task has a world of its own: a gloo group keeps a thread that wakes all the time, and tasks
        # make many groups.
        if not dist.is_initialized():
            dist.init_process_group("nccl" if simulated else "gloo", rank=rank, world_size=size,
                                    store=dist.PrefixStore(str(number), store),
                                    device_id=torch.device("cuda", rank) if simulated else None)
        task = pipe.recv()
        if task is None:
            break
        function, arguments = task
        try:
            result = function(*arguments)
            pipe.send(("", _on_host(result) if simulated else result))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
        if not lasting and dist.is_initialized():
            dist.destroy_process_group()
    dist.barrier()
    dist.destroy_process_group()
