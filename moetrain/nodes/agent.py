"""torchrun's agent on this node: `python -m moetrain.nodes.agent <arguments of torchrun>`, started by supervise.py.

It differs from torchrun in three things: it ends with the code of the rank that failed first (128 + signal when a signal
ended it) instead of 1; a failure is a line, not a traceback; and signals meant for the ranks do not end it, even when
they are sent to every process of a job, as Slurm does.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from moetrain import streams

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)    # to the ranks, by supervise.py
END = signal.SIGUSR2                                                          # ends the agent, and the ranks with it

_OTHERS_LOST = 16


def main(argv: Sequence[str]) -> int:
    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:       # nohup stays nohup
            signal.signal(number, lambda *_: None)               # ranks would inherit SIG_IGN, but not this
    streams.keep_open()
    streams.outlive()
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
    from torch.distributed.run import parse_args, run

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
        return _OTHERS_LOST
    except (RendezvousError, dist.DistStoreError, dist.DistNetworkError) as error:
        print(f"moetrain: the other nodes were lost: {str(error.__cause__ or error).splitlines()[0]}", file=sys.stderr)
        return _OTHERS_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
