"""Picture of losses: its headline and its table."""

import csv
import json
from math import log
from pathlib import Path

import numpy as np
import pytest

from moetrain.report.loss import draw_loss, headline, read_losses


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Records of 200 steps and two domains, evaluated twice, resumed twice after step 50; some damaged."""
    (tmp_path / "log").mkdir()
    lines = [json.dumps({"step": step, "tokens": 100 * step, "loss/ce": 1 + 4 / step, "loss/total": 9.0})
             for step in range(1, 201)]
    lines.insert(20, '{"step": 20, "tok')
    lines.insert(30, "[" * 2000)
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    evaluations = [{"step": step, "tokens": 100 * step, "loss/cpp": 2.0 - step / 200, "loss/a\x1bb": 2.0,
                    "loss/mean": 2.0 - step / 400,
                    "nats_per_byte/mean": log(2) * step / 100, "moe/mutual_information/mean": 0.1,
                    "timestamp": 1.0} for step in (100, 200)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evaluations))
    attempts = [{"start": 0, "pid": 1}, {"end": 137}, {"start": 50, "pid": 2}, {"start": 50, "pid": 3},
                {"end": 0}, {"start": 200}]
    (tmp_path / "log" / "attempts.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in attempts))
    return tmp_path


def test_it_is_drawn_with_its_values_beside_it(run_dir: Path) -> None:
    assert draw_loss(run_dir) == run_dir / "report" / "loss.png"
    assert (run_dir / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    with (run_dir / "report" / "loss.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["step", "tokens", "training", "held-out cpp", "held-out a\\x1bb",
                              "held-out mean", "resumed"]
    assert [row["step"] for row in table] == [str(step) for step in range(1, 201)]
    assert table[3]["training"] == "2" and table[3]["held-out mean"] == "" and table[3]["tokens"] == "400"
    assert table[99]["held-out mean"] == "1.75" and table[199]["held-out cpp"] == "1"
    assert [row["step"] for row in table if row["resumed"] == "1"] == ["50"]


def test_its_title_says_what_it_shows(run_dir: Path) -> None:
    found = read_losses(run_dir)
    assert headline(found) == ("Training loss falls from 5.00 to 1.02 nats per token in 20.0k tokens; "
                               "held-out 1.50 (2.00 bits per byte)")
    assert found.resumed == [50] and len(found.steps) == 200


def test_what_little_there_is_is_drawn(tmp_path: Path) -> None:
    assert draw_loss(tmp_path) is None                       # no record at all
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss/ce": 3.0}\n')
    assert draw_loss(tmp_path) is not None                   # one step, no evaluation
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tokens": 10, "loss/ce": NaN}\n')
    (tmp_path / "eval.jsonl").write_text('{"step": 2, "loss/mean": 3.0, "nats_per_byte/mean": 3.0}\n')
    assert draw_loss(tmp_path) is not None and np.isnan(read_losses(tmp_path).training[1])
