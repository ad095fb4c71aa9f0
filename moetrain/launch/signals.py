"""Forwarding of the signals that end or save a run to the processes that do the work.

A launcher outlives its ranks: it handles these signals itself, hands each to the ranks once, and then waits
for them.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def forward_signals(send: Callable[[int], None] = lambda number: None) -> Iterator[list[int]]:
    """Handle `FORWARDED` while the block runs, and yield the list of the signals received so far.

    A signal that was ignored before stays ignored, so `nohup` keeps its meaning. In a thread other than the
    main one nothing is handled, because Python runs signal handlers in the main thread only.

    Args:
        send: called with the number of each signal, from the signal handler, after the number was added to
            the list.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        send(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in FORWARDED if in_main_thread}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
