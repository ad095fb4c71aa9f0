"""Classify failures of collectives and identify unresponsive ranks."""

import threading
import time

import torch.distributed as dist

# Seconds for the ranks to report that they are alive: their waits do not end at the same moment.
ROLL_S = 10.0


def peer_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because a rank is gone or did not answer in time.

    Not every backend has an exception class for this, so texts of gloo and NCCL are recognized.
    """
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo/transport" in text or _in_vain(error)


def silent_ranks(error: RuntimeError) -> str:
    """Name the ranks that others waited for in vain; "" where that is not known. Waits for up to ROLL_S.

    Every rank whose wait has ended reports in the store of the job; a rank that hangs does not. Where a
    connection broke instead, no rank is asked: the launcher knows more.
    """
    if not _in_vain(error):
        return ""
    rank, silent, until = dist.get_rank(), set(range(dist.get_world_size())), time.monotonic() + ROLL_S
    store = dist.distributed_c10d._get_default_store()

    def ask() -> None:
        store.set(f"waited/{rank}", b"")
        while silent and time.monotonic() < until:
            silent.difference_update([other for other in silent if store.check([f"waited/{other}"])])
            time.sleep(0.1)

    # In a thread, because the rank that has the store may itself hang.
    asking = threading.Thread(target=ask, name="roll", daemon=True)
    asking.start()
    asking.join(ROLL_S + 1)
    if asking.is_alive():
        return "0 or its machine, where the store of the job is"
    return ", ".join(map(str, sorted(silent)))


def _in_vain(error: RuntimeError) -> bool:
    """Whether a wait for another rank ended at its time limit, by the texts of gloo, the store and NCCL."""
    text = str(error)
    return ("Socket Timeout" in text or "timeout caused" in text
            or "Timed out waiting" in text and "ms for" in text)
