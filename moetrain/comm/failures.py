"""A collective has failed: because a rank is gone or does not answer, and which one that is."""

import threading
import time

import torch.distributed as dist

ROLL_S = 10.0                # for the ranks to say that they are there: their waits do not end at the same moment


def peer_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because a rank is gone or did not answer in time; not every backend has a class for it."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo/transport" in text or _in_vain(error)


def silent_ranks(error: RuntimeError) -> str:
    """The ranks that others waited for in vain, "" where that is not known. Waits for up to ROLL_S.

    Every rank whose wait has ended says so in the store of the job; a rank that hangs does not. Where a connection broke
    instead, the launcher knows more: nothing is asked then.
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

    asking = threading.Thread(target=ask, name="roll", daemon=True)      # the store may be with a rank that is frozen
    asking.start()
    asking.join(ROLL_S + 1)
    if asking.is_alive():
        return "0 or its machine, where the store of the job is"
    return ", ".join(map(str, sorted(silent)))


def _in_vain(error: RuntimeError) -> bool:
    text = str(error)
    return "Socket Timeout" in text or "timeout caused" in text or "Timed out waiting" in text and "ms for" in text
