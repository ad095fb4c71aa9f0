"""What a run shows, on a terminal and in a file."""

import io
import logging

import pytest

from moetrain.train.loggers.console import (
    BANNER_LINES,
    Console,
    Eta,
    banner,
    connect_logging,
    eval_line,
    heatmap,
    summary,
)
from tests.support.text_file import File

METRICS = {
    "step": 1200, "loss/ce": 3.1416, "lr": 2.9e-4, "grad_norm": 0.8123, "loss/balance": 1.0213,
    "moe/max_violation/max": 0.18, "moe/dead_experts": 0, "moe/drop_fraction": 0.0, "time/step": 1.27,
    "throughput/tokens_per_s": 412345.0, "memory/peak": 33.1 * 2**30,
}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_banner_and_summary_are_aligned() -> None:
    rows = [("", "moetrain 0.1.0 | run runs/demo"), ("model", "8 layers"), ("parallel", "8 ranks")]
    assert banner(rows).splitlines() == ["moetrain 0.1.0 | run runs/demo", "model     8 layers",
                                         "parallel  8 ranks"]
    assert summary([("loss", "1.2")],
                   ["moetrain report demo", "moetrain eval run.name=demo"]).splitlines() == [
        "loss  1.2", "next  moetrain report demo", "      moetrain eval run.name=demo"]
    with pytest.raises(AssertionError):
        banner([("row", "")] * (BANNER_LINES + 1))


def test_an_evaluation_is_shown_by_domain_and_in_bits() -> None:
    assert eval_line(500, {"loss/a": 2.0, "nats_per_byte/a": 1.0, "nats_per_byte/mean": 1.0}) == (
        "[eval] step 500, nats per byte: a 1.000  mean 1.000 (1.443 bits)")


def test_heatmap_marks_dead_experts_and_scales_to_twice_the_mean() -> None:
    head, first, second = heatmap([[0, 10, 20, 10], [4, 4]], ["layers.0", "layers.1"], 60).splitlines()
    assert "no tokens" in head
    assert first == "layers.0  xxx▅▅▅███▅▅▅  max 2.00x  dead 1"
    assert second == "layers.1  ▅▅▅▅▅▅        max 1.00x"


def test_heatmap_fits_its_width_and_a_dead_expert_shows_among_neighbours() -> None:
    counts = [[10] * 255 + [0], [10] * 256]
    head, first, second = heatmap(counts, ["a", "b"], 60).splitlines()
    assert max(len(first), len(second)) <= 60 and "experts a column" in head
    assert first.split()[1].endswith("x") and "dead 1" in first and "x" not in second.split()[1]


def test_heatmap_falls_back_to_ascii() -> None:
    assert heatmap([[0, 1, 2], [0, 0, 0]], ["a", "b"], 60, unicode=False).isascii()


def test_eta_counts_evaluations_and_saves_but_not_the_start() -> None:
    eta = Eta()
    assert eta.seconds(10) is None
    now = 1000.0
    for step in range(1, 11):
        now += 1.0 + (5.0 if step == 5 else 0.0) + (30.0 if step == 1 else 0.0)   # a save; a slow start
        eta.add(1.0, now)
    assert eta.seconds(9) == pytest.approx(9 * (1 + 5 / 9))


def test_a_file_gets_plain_lines() -> None:
    stream = File()
    with Console(rank=0, steps=4, interval=2, stream=stream) as console:
        console.banner([("", "moetrain 0.1.0")])
        for step in range(1, 5):
            console.step(METRICS | {"step": step, "loss/ce": float(step)})
        logging.getLogger("moetrain.train.loop").warning("disk is %s", "slow")
        logging.getLogger("moetrain.train.loop").info("[save] step 4")
        console.heatmap({"layers.0.moe": [1, 2]})
        console.summary([("loss", "3.14")], [])
    lines = stream.getvalue().splitlines()
    assert ([line.split()[1:5:3] for line in lines if line.startswith("step")]
            == [["1/4", "1.000"], ["2/4", "2.000"], ["4/4", "3.500"]])
    assert lines[0] == "moetrain 0.1.0" and "[warn] disk is slow" in lines and "[save] step 4" in lines
    assert "\x1b" not in stream.getvalue() and lines[-1] == "loss  3.14"


def test_a_terminal_gets_a_bar_with_the_lines_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Console(rank=0, steps=2, stream=stream) as console:
        for step in (1, 2):
            console.step(METRICS | {"step": step})
        console.line("[save] [bold] step 2")
    text = stream.getvalue()
    # No color.
    assert "2/2" in text and "eta" in text and "[save] [bold] step 2" in text and "\x1b[3" not in text
    plain = Terminal()
    with Console(rank=0, steps=1, stream=plain, progress=False) as console:
        console.step(METRICS | {"step": 1})
    assert "\x1b" not in plain.getvalue()


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture) -> None:
    stream = File()
    with Console(rank=1, steps=1, stream=stream) as console:
        console.banner([("", "moetrain")])
        console.step(METRICS)
        console.heatmap({"a": [1]})
        console.summary([], [])
        logging.getLogger("moetrain.x").warning("heard by nobody")
    assert stream.getvalue() == "" and capsys.readouterr() == ("", "")


def test_a_stream_that_cannot_show_blocks_gets_ascii() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(rank=0, steps=1, stream=stream)
    console.heatmap({"a": [1, 2, 0]})
    console.line("name: Fußball")
    console.close()
    assert stream.buffer.getvalue().isascii() and b"x" in stream.buffer.getvalue()


def test_the_logger_is_given_back() -> None:
    logger = logging.getLogger("moetrain")
    before = logger.handlers[:], logger.level, logger.propagate
    connect_logging(lambda line: None)()
    assert (logger.handlers[:], logger.level, logger.propagate) == before
