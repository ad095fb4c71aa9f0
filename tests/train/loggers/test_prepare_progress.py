"""The progress of a preparation: a bar on a terminal with the log above it, lines elsewhere."""

import logging
import os
import sys

import pytest

from moetrain.train.loggers import prepare_progress as preparing
from moetrain.train.loggers.prepare_progress import Preparing, progress_line


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = iter([0.0, 4.0, 11.0, 12.0, 25.0, 26.0, 40.0])
    monkeypatch.setattr(preparing.time, "monotonic", lambda: next(now))
    with caplog.at_level(logging.INFO), Preparing() as progress:
        for done in (0, 10 << 20, 30 << 20, 31 << 20, 60 << 20):
            progress("reading", done, 60 << 20)
        progress("tokenizing", 0, 60 << 20)
        progress("tokenizing", 60 << 20, 60 << 20)
    assert [record.message for record in caplog.records] == [
        "[data] reading 30.0M of 60.0M, 50%, 2.7M/s, eta 11s",
        "[data] reading 60.0M of 60.0M, 100%, 2.4M/s, eta 0.00s",
        "[data] tokenizing 60.0M of 60.0M, 100%, 4.3M/s, eta 0.00s"]
    assert progress_line("reading", 0, 0, 0.0) == "reading 0K of 0K, 0%, 0K/s"


@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_has_a_bar_and_the_log_above_it(monkeypatch: pytest.MonkeyPatch, bar: bool) -> None:
    master, slave = os.openpty()
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        handlers = logging.getLogger("moetrain").handlers[:]
        with Preparing(bar=bar) as progress:
            progress("reading", 0, 5_000_000)
            logging.getLogger("moetrain.data").warning("left out one file")
            progress("reading", 5_000_000, 5_000_000)
        terminal.flush()
        monkeypatch.undo()
        shown = os.read(master, 1 << 16).decode() if bar else ""
    os.close(master)
    assert logging.getLogger("moetrain").handlers == handlers
    assert all((words in shown) == bar
               for words in ("reading", "5.0/5.0 MB", "100%", "[warn] left out one file"))
