"""A rank of a tool, under gloo: it waits for the others with a limit, and goes at once when it fails.

    with connected(300):
        ...                    # torch.distributed, gloo

What names a rank that others wait for: `dist.monitored_barrier`, and tools/netlab/processes.py when it still runs in the end.
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
    """The process group that the environment describes, until the block ends. wait_s: of every wait for another rank."""
    try:
        connect(torch.device("cpu"), wait_s)
        yield
        disconnect()
    except BaseException as error:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # A clean exit waits for exchanges under way, in which the others take no part when they wait for something else of us.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
