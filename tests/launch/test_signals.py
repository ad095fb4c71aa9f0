"""Signals that a launcher forwards to its ranks."""

import signal
import threading

from moetrain.launch.signals import FORWARDED, forward_signals


def test_each_signal_is_sent_once_and_recorded_in_order():
    sent = []
    with forward_signals(sent.append) as received:
        for number in FORWARDED:
            signal.raise_signal(number)
    assert sent == received == list(FORWARDED)


def test_handlers_come_back_when_the_block_ends():
    before = [signal.getsignal(number) for number in FORWARDED]
    with forward_signals():
        assert all(signal.getsignal(number) != handler
                   for number, handler in zip(FORWARDED, before, strict=True))
    assert [signal.getsignal(number) for number in FORWARDED] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with forward_signals() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_handled():
    before = [signal.getsignal(number) for number in FORWARDED]
    seen = []

    def enter() -> None:
        with forward_signals() as received:
            seen.extend(signal.getsignal(number) for number in FORWARDED)
            assert received == []

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == before
