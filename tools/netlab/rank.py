"""Process group of a tool's rank under gloo: every wait has a limit, and a rank that fails leaves at once.

    with connected(300):
        ...                    # torch.distributed, gloo

A rank that others wait for is named by `dist.monitored_barrier`, and by tools/netlab/processes.py when it
still runs in the end.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moetrain.comm.mesh import connect, disconnect


@contextmanager
def connected(wait_s: int) -> Iterator[None]:
    """Open the process group that the environment describes until the block ends.

    Args:
        wait_s: limit of every wait for another rank, in seconds.
    """
    try:
        connect(torch.device("cpu"), wait_s)
        yield
        disconnect()
    except BaseException as error:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # A clean exit waits for exchanges under way, and the other ranks take no part in them once they wait
        # for something else of this rank.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
