"""The step line, and what it makes of several steps."""

from math import isnan, nan

import pytest

from moetrain.train.loggers.step_line import StepMeans, fold, step_line

METRICS = {
    "step": 1200, "loss/ce": 3.1416, "lr": 2.9e-4, "grad_norm": 0.8123, "loss/balance": 1.0213,
    "moe/max_violation/max": 0.18, "moe/dead_experts": 0, "moe/drop_fraction": 0.0, "time/step": 1.27,
    "throughput/tokens_per_s": 412345.0, "memory/peak": 33.1 * 2**30,
}


def test_it_shows_loss_routing_and_speed() -> None:
    assert step_line(METRICS, 10000, 11190) == (
        "step  1200/10000  12%  loss 3.142 nats lr 2.9e-4  gnorm 0.81 | bal 1.02 maxvio 0.18 dead 0 drop 0.0%"
        " |  412k tok/s mem 33.1G | 1.27s eta 3h06")


def test_it_leaves_out_what_was_not_measured() -> None:
    dense = {key: value for key, value in METRICS.items() if not key.startswith(("moe/", "loss/balance"))}
    assert "bal" not in step_line(dense, 10000) and "| |" not in step_line(dense, 10000)
    assert "mfu 38.2%" in step_line(METRICS | {"throughput/mfu": 0.382}, 10000)
    assert step_line({"step": 3}, 9).startswith("step     3/9  33%")


def test_further_losses_are_shown_unless_they_are_zero() -> None:
    line = step_line(
        METRICS | {"loss/total": 4.0, "loss/weighted/z": 0.01, "loss/z": 12.34, "loss/entropy": 0.0}, 10000)
    assert "| bal 1.02 z 12.3 maxvio 0.18" in line
    assert not any(words in line for words in ("weighted", "entropy", "4.0"))


def test_a_loss_that_is_not_a_number_is_shown() -> None:
    line = step_line(METRICS | {"loss/ce": nan, "grad_norm": float("inf"), "lr": nan}, 10000)
    assert "loss nan" in line and "gnorm inf" in line


def test_lines_have_one_width() -> None:
    later = METRICS | {"step": 9, "loss/ce": 0.51, "grad_norm": 1.5, "lr": 1e-5,
                       "throughput/tokens_per_s": 98765.0}
    assert len(step_line(METRICS, 10000, 700)) == len(step_line(later, 10000, 700))


def test_a_narrow_terminal_breaks_at_bars() -> None:
    assert fold(["first part", "second", "third"], 24).splitlines() == ["first part | second", "     | third"]


def test_several_steps_are_one_record() -> None:
    means = StepMeans()
    first = {"step": 1, "lr": 1e-3, "loss/ce": 4.0, "loss/z": 3.0, "grad_norm": 9.0, "moe/dead_experts": 2,
             "moe/max_violation/max": 1.0,
             "time/step": 3.0, "throughput/tokens_per_s": 100.0, "memory/peak": 5}
    second = {"step": 2, "lr": 2e-3, "loss/ce": 2.0, "loss/z": 1.0, "grad_norm": 1.0, "moe/dead_experts": 0,
              "moe/max_violation/max": 0.0,
              "time/step": 1.0, "throughput/tokens_per_s": 300.0, "memory/peak": 6, "time/data/max": 0.5}
    for record in (first, second):
        means.add(record)
    assert means.take() == {
        "step": 2, "lr": 2e-3, "loss/ce": 3.0, "loss/z": 2.0, "grad_norm": 9.0, "moe/dead_experts": 0,
        "moe/max_violation/max": 0.5,
        # 600 tokens in 4 s.
        "time/step": 2.0, "throughput/tokens_per_s": 150.0, "memory/peak": 6, "time/data/max": 0.5}
    means.add(second)
    assert means.take() == second                            # nothing of the steps before


@pytest.mark.parametrize("norms", [[1.0, nan, 2.0], [nan, 1.0, 2.0]])
def test_a_norm_that_is_not_a_number_is_not_hidden(norms: list[float]) -> None:
    means = StepMeans()
    for norm in norms:
        means.add({"grad_norm": norm})
    assert isnan(means.take()["grad_norm"])
