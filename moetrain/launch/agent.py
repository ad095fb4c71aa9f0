"""torchrun's agent on one node: `python -m moetrain.launch.agent <supervisor> <arguments of torchrun>`.

supervisor.py starts it and passes its own process id as the first argument. It differs from torchrun in four
ways:

    exit code   that of the rank that failed first (128 + signal when a signal ended it); torchrun ends with 1
    failures    one line each, no traceback
    signals     those meant for the ranks do not end it, even sent to every process of a job, as Slurm does
    supervisor  when that process is gone, the ranks save and leave, and the agent ends
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from moetrain import streams
from moetrain.launch.ranks_of_agent import ranks_of
from moetrain.launch.signals import FORWARDED

END = signal.SIGUSR2  # ends the agent, and the ranks with it

_PEER = 16  # exit code: other nodes or ranks were lost
_POLL_S = 1.0


def main(argv: Sequence[str]) -> int:
    """Run torchrun with the arguments after the supervisor's process id; returns the exit code."""
    supervisor, *argv = argv
    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # an ignored signal stays ignored, for nohup
            signal.signal(number, lambda *_: None)  # not SIG_IGN, which the ranks would inherit
    streams.keep_open()
    streams.outlive()
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
    from torch.distributed.run import parse_args, run

    threading.Thread(
        target=_end_with_supervisor, args=(int(supervisor),), name="supervisor", daemon=True).start()
    # torch's handler of END raises an exception. While torch logs, `logging` would catch it and the signal
    # would be lost.
    logging.disable(logging.ERROR)
    try:
        run(parse_args(["--signals-to-handle", END.name, *argv]))
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode < 0:
            print(f"moetrain: rank {rank} was ended by {signal.Signals(-first.exitcode).name}",
                  file=sys.stderr)
            return 128 - first.exitcode
        print(f"moetrain: rank {rank} ended with {first.exitcode}", file=sys.stderr)
        return first.exitcode
    except SignalException as ended:
        return 128 + ended.sigval
    except RendezvousClosedError:
        print("moetrain: another node has ended the run", file=sys.stderr)
        return _PEER
    except (RendezvousError, dist.DistStoreError, dist.DistNetworkError) as error:
        print(f"moetrain: the other nodes were lost: {str(error.__cause__ or error).splitlines()[0]}",
              file=sys.stderr)
        return _PEER
    return 0


def _end_with_supervisor(supervisor: int) -> None:
    """Wait for the supervisor's end, then have the ranks save and leave, and end the agent.

    Without a supervisor no signal would be forwarded to the ranks any more.
    """
    while os.getppid() == supervisor:
        time.sleep(_POLL_S)
    signaled = ranks_of(os.getpid())
    for rank in signaled:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGTERM)  # a rank leaves by itself when run.grace_s is over
    while signaled & ranks_of(os.getpid()):
        time.sleep(_POLL_S)
    os.kill(os.getpid(), END)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
