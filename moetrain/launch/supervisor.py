"""From the start of torchrun on this node to the exit code of the run.

    signals   SIGTERM, SIGUSR1, SIGINT and SIGHUP are passed on to each rank of this node once; none is killed before
              run.grace_s is over. torchrun alone dies of SIGUSR1, and kills the ranks 30 seconds after SIGTERM.
    restarts  torchrun's, but for failures that would only come again: those end the run at once.
    ending    the code in <run.dir>/status.json, which rank 0 writes, on whichever node.
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
# Configuration, numbers, data, checkpoint, disk, crash loop: the next attempt would fail alike.
_FINAL = {2, 11, 12, 13, 14, 17, 18}
_POLL_S = 0.1
_EXIT_MARGIN_S = 30.0           # after run.grace_s, at which a rank leaves by itself


def supervise(node: Node, argv: Sequence[str], run_dir: Path, grace_s: float | None, *, was_finished: bool = False) -> int:
    """Run `python -m moetrain <argv>` on this node's ranks by torchrun; the exit code of the run.

    grace_s: run.grace_s. was_finished: there is nothing to do, so the ranks will record nothing.
    """
    status, ranks = StatusFile(run_dir), set()
    with forward_signals() as signals:
        agent = subprocess.Popen([sys.executable, "-m", "moetrain.launch.agent", str(os.getpid()), *_torchrun_options(node), "-m", "moetrain",
                                  *argv], env=_environment(node))
        try:
            killed = _watch(agent, ranks, status, signals, math.inf if grace_s is None else grace_s + _EXIT_MARGIN_S)
        finally:
            _end(agent, ranks)
    code = _PEER if killed else run_exit_code(agent.returncode, status.written(), signals)
    if code == 0 and node.nodes == 1 and not was_finished and status.written() is None:       # other machines may see it late
        print("moetrain: the ranks left with 0 before the run was done", file=sys.stderr)
        code = _PEER
        write_status(run_dir, code, "the ranks left with 0 before the run was done")
    if code == _PEER and status.written() is None:           # rank 0 could not say it
        how = f"did not end in time after {signal.Signals(signals[0]).name}" if killed else "was lost"
        write_status(run_dir, code, f"a rank of node {node.rank} {how}")
    return code


class StatusFile:
    """status.json, as far as the run that is supervised has written it. The next attempt removes it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "status.json"
        self._before = self._identity()
        self._final: dict | None = None

    def written(self) -> dict | None:
        with suppress(OSError, ValueError):
            if self._final is None and self._identity() != self._before:
                status = read_json(self._path)
                code = status.get("code") if isinstance(status, dict) else None
                if type(code) is not int or not 0 <= code < 256:
                    return None                              # not what rank 0 writes
                self._final = status if code in _FINAL else None
                return status
        return self._final

    def is_final(self) -> bool:
        """True once no attempt can go better."""
        return self.written() is not None and self._final is not None

    def _identity(self) -> tuple[int, int] | None:
        with suppress(OSError):
            found = self._path.stat()
            return found.st_ino, found.st_mtime_ns
        return None


def run_exit_code(returned: int, status: dict | None, signals: Sequence[int]) -> int:
    """The exit code of the run, from that of the agent, what rank 0 wrote, and the signals that were passed on."""
    if status is not None and (returned or status["code"] == _PREEMPTED):     # a preempted rank exits 0 under torchrun
        return status["code"] or returned
    if returned and signals and status is None and (returned > 128 or returned < 0):
        return 130 if signals[0] == signal.SIGINT else _PREEMPTED             # before there was anything to save
    return _PEER if returned > 128 or returned < 0 else returned


# --- while it runs


def _watch(agent: subprocess.Popen, latest: set[int], status: StatusFile, signals: list[int], grace_s: float) -> bool:
    """Until the agent ends, or is to be ended. True where ranks had to be killed.

    latest: receives the ranks of the newest attempt.
    """
    forwarded, signaled, deadline = 0, set(), math.inf
    while agent.poll() is None:
        ranks = ranks_of(agent.pid)
        if len(signals) > forwarded:
            deadline = min(deadline, time.monotonic() + grace_s)
            for number in signals[forwarded:]:
                _signal(ranks, number)
            forwarded, signaled = len(signals), signaled | ranks
        if signals and (ranks - signaled or not signaled):               # restarted, or not even started, when the signal came
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
    """End the agent and its ranks, if they have not ended. An agent that was killed leaves its ranks behind."""
    for number in (END, signal.SIGKILL):
        if agent.poll() is None:
            agent.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                agent.wait(10)
    deadline = time.monotonic() + 10
    while (left := {rank for rank in ranks if parent_of_leader(rank) is not None}) and time.monotonic() < deadline:
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
        "--nnodes", str(node.nodes), "--nproc-per-node", str(node.nproc), "--max-restarts", str(node.restarts),
        "--rdzv-backend", "c10d", "--rdzv-id", "moetrain",
        "--rdzv-endpoint", f"{node.head}:{node.port}" if several else "localhost:0",
        # torchrun does not recognise a head by every one of its names; the head's machine has to be told what it is.
        "--rdzv-conf", f"is_host={int(node.rank == 0)},read_timeout={node.timeout_s}",
        "--local-addr", own_address(node) if several else "127.0.0.1",
    ]


def _environment(node: Node) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // node.nproc)), **program_environment()}
    # Without it restarted ranks read the addresses of dead ones from the store and never connect.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if name := interface(node):
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
        if node.nodes > 1:
            environment.setdefault("NCCL_SOCKET_IFNAME", name)
    return environment
