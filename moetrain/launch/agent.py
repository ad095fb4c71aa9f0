"""torchrun's agent on this node: `python -m moetrain.launch.agent <supervisor> <arguments of torchrun>`, started by
supervisor.py, whose process id the first argument is.

It differs from torchrun in four things: it ends with the code of the rank that failed first (128 + signal when a signal
ended it) instead of 1; a failure is a line, not a traceback; signals meant for the ranks do not end it, even when they
are sent to every process of a job, as Slurm does; and when its supervisor is gone, the ranks save and all of it ends.
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

END = signal.SIGUSR2                                                          # ends the agent, and the ranks with it

_PEER = 16
_POLL_S = 1.0


def main(argv: Sequence[str]) -> int:
    supervisor, *argv = argv
    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:       # nohup stays nohup
            signal.signal(number, lambda *_: None)               # ranks would inherit SIG_IGN, but not this
    streams.keep_open()
    streams.outlive()
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
    from torch.distributed.run import parse_args, run

    threading.Thread(target=_end_with_supervisor, args=(int(supervisor),), name="supervisor", daemon=True).start()
    logging.disable(logging.ERROR)       # a signal that arrives while torch logs is lost: logging catches what the handler raises
    try:
        run(parse_args(["--signals-to-handle", END.name, *argv]))
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode < 0:
            print(f"moetrain: rank {rank} was ended by {signal.Signals(-first.exitcode).name}", file=sys.stderr)
            return 128 - first.exitcode
        print(f"moetrain: rank {rank} ended with {first.exitcode}", file=sys.stderr)
        return first.exitcode
    except SignalException as ended:
        return 128 + ended.sigval
    except RendezvousClosedError:
        print("moetrain: another node has ended the run", file=sys.stderr)
        return _PEER
    except (RendezvousError, dist.DistStoreError, dist.DistNetworkError) as error:
        print(f"moetrain: the other nodes were lost: {str(error.__cause__ or error).splitlines()[0]}", file=sys.stderr)
        return _PEER
    return 0


def _end_with_supervisor(supervisor: int) -> None:
    """Once the supervisor is gone nobody would pass a signal on: the ranks are told to save and leave, then the agent ends."""
    while os.getppid() == supervisor:
        time.sleep(_POLL_S)
    signaled = ranks_of(os.getpid())
    for rank in signaled:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGTERM)                # a rank leaves by itself when run.grace_s is over
    while signaled & ranks_of(os.getpid()):
        time.sleep(_POLL_S)
    os.kill(os.getpid(), END)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
