"""Supervision of torchrun on one node, from its start to the exit code of the run.

    signals    SIGTERM, SIGUSR1, SIGINT and SIGHUP are forwarded to each rank of this node once. No rank is
               killed before run.grace_s is over. torchrun alone dies of SIGUSR1, and kills the ranks
               30 seconds after SIGTERM.
    restarts   done by torchrun. A failure that the next attempt would repeat ends the run at once instead.
    exit code  taken from <run.dir>/status.json, which rank 0 writes on whichever node it runs.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from moetrain.files import read_json
from moetrain.launch.agent import END
from moetrain.launch.local import program_environment
from moetrain.launch.node import Node, cores
from moetrain.launch.ranks_of_agent import parent_of_leader, ranks_of
from moetrain.launch.rendezvous import interface, own_address
from moetrain.launch.signals import forward_signals
from moetrain.launch.status import write_status

_PREEMPTED, _PEER = 10, 16
# Exit codes after which the next attempt would fail again: configuration, numbers, data, checkpoint, disk,
# crash loop.
_FINAL = {2, 11, 12, 13, 14, 17, 18}
_POLL_S = 0.1
_EXIT_MARGIN_S = 30.0  # added to run.grace_s, after which a rank leaves by itself


def supervise(node: Node, argv: Sequence[str], run_dir: Path, grace_s: float | None, *,
              was_finished: bool = False) -> int:
    """Run `python -m moetrain <argv>` on this node's ranks by torchrun.

    Args:
        node: place of this machine among those of the run.
        argv: verb and overrides.
        run_dir: directory of the run.
        grace_s: run.grace_s, the seconds that a rank has to save after a signal; None sets no limit.
        was_finished: the run had ended before, so the ranks will record nothing.

    Returns:
        The exit code of the run.
    """
    status, ranks = StatusFile(run_dir), set[int]()
    with forward_signals() as signals:
        agent = subprocess.Popen(
            [sys.executable, "-m", "moetrain.launch.agent", str(os.getpid()), *_torchrun_options(node),
             "-m", "moetrain", *argv], env=_environment(node))
        try:
            killed = _watch(agent, ranks, status, signals,
                            math.inf if grace_s is None else grace_s + _EXIT_MARGIN_S)
        finally:
            _end(agent, ranks)
    code = _PEER if killed else run_exit_code(agent.returncode, status.written(), signals)
    # With several nodes a file that rank 0 wrote may appear late here, so its absence says nothing.
    if code == 0 and node.nodes == 1 and not was_finished and status.written() is None:
        print("moetrain: the ranks left with 0 before the run was done", file=sys.stderr)
        code = _PEER
        write_status(run_dir, code, "the ranks left with 0 before the run was done")
    if code == _PEER and status.written() is None:  # rank 0 could not report it
        how = f"did not end in time after {signal.Signals(signals[0]).name}" if killed else "was lost"
        write_status(run_dir, code, f"a rank of node {node.rank} {how}")
    return code


class StatusFile:
    """The status.json that the supervised run writes; a file that was there before does not count.

    Each new attempt of the run removes the file, so a final status is remembered.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "status.json"
        self._before = self._identity()
        self._final: dict | None = None

    def written(self) -> dict | None:
        """Content of the file as the run last wrote it; None where it has written none, or nothing valid."""
        with suppress(OSError, ValueError):
            if self._final is None and self._identity() != self._before:
                status = read_json(self._path)
                code = status.get("code") if isinstance(status, dict) else None
                if type(code) is not int or not 0 <= code < 256:
                    return None  # rank 0 does not write this
                self._final = status if code in _FINAL else None
                return status
        return self._final

    def is_final(self) -> bool:
        """Whether the run has failed in a way that every further attempt would repeat."""
        return self.written() is not None and self._final is not None

    def _identity(self) -> tuple[int, int] | None:
        with suppress(OSError):
            found = self._path.stat()
            return found.st_ino, found.st_mtime_ns
        return None


def run_exit_code(returned: int, status: dict | None, signals: Sequence[int]) -> int:
    """Derive the exit code of a run.

    Args:
        returned: exit code of torchrun's agent; negative where a signal ended it.
        status: status.json of the run, where rank 0 has written one.
        signals: those forwarded to the ranks, in order.
    """
    # Under torchrun a preempted rank exits with 0; rank 0 has written its code.
    if status is not None and (returned or status["code"] == _PREEMPTED):
        return status["code"] or returned
    if returned and signals and status is None and (returned > 128 or returned < 0):
        return 130 if signals[0] == signal.SIGINT else _PREEMPTED  # it came before there was anything to save
    return _PEER if returned > 128 or returned < 0 else returned


# --- while it runs


def _watch(agent: subprocess.Popen, latest: set[int], status: StatusFile, signals: list[int],
           grace_s: float) -> bool:
    """Forward signals to the ranks until the agent ends, or has to be ended.

    Args:
        agent: process of torchrun's agent.
        latest: is set to the process ids of the newest attempt's ranks.
        status: the run's status.json.
        signals: numbers of the signals received, which grows meanwhile.
        grace_s: seconds after the first signal at which ranks are killed.

    Returns:
        True where ranks had to be killed.
    """
    forwarded, signaled, deadline = 0, set[int](), math.inf
    while agent.poll() is None:
        ranks = ranks_of(agent.pid)
        if len(signals) > forwarded:
            deadline = min(deadline, time.monotonic() + grace_s)
            for number in signals[forwarded:]:
                _signal(ranks, number)
            forwarded, signaled = len(signals), signaled | ranks
        # Ranks that started after the signal, by a restart or because none was there yet, never received it.
        if signals and (ranks - signaled or not signaled):
            return False
        if time.monotonic() > deadline:
            _signal(ranks, signal.SIGKILL)
            return True
        if not signals and status.is_final():
            return False
        if latest and ranks and not ranks & latest:
            print("moetrain: a rank failed; all ranks start again from the newest save", file=sys.stderr)
        if ranks:
            latest.clear()
            latest.update(ranks)
        time.sleep(_POLL_S)
    return False


def _end(agent: subprocess.Popen, ranks: set[int]) -> None:
    """End the agent and its ranks where they still run. An agent that was killed leaves its ranks behind."""
    for number in (END, signal.SIGKILL):
        if agent.poll() is None:
            agent.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                agent.wait(10)
    deadline = time.monotonic() + 10
    while ((left := {rank for rank in ranks if parent_of_leader(rank) is not None})
           and time.monotonic() < deadline):
        _signal(left, signal.SIGKILL)
        time.sleep(_POLL_S)


def _signal(ranks: set[int], number: int) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, number)


# --- what is started


def _torchrun_options(node: Node) -> list[str]:
    several = node.nodes > 1
    return [
        "--nnodes", str(node.nodes), "--nproc-per-node", str(node.nproc),
        "--max-restarts", str(node.restarts),
        "--rdzv-backend", "c10d", "--rdzv-id", "moetrain",
        "--rdzv-endpoint", f"{node.head}:{node.port}" if several else "localhost:0",
        # torchrun does not recognize every name of the head, so each machine is told whether it is the head.
        "--rdzv-conf", f"is_host={int(node.rank == 0)},read_timeout={node.timeout_s}",
        "--local-addr", own_address(node) if several else "127.0.0.1",
    ]


def _environment(node: Node) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // node.nproc)), **program_environment()}
    # Restarted ranks would read the addresses of dead ones from a shared store, and never connect.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if name := interface(node):
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
        if node.nodes > 1:
            environment.setdefault("NCCL_SOCKET_IFNAME", name)
    return environment
