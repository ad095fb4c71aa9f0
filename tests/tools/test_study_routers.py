"""The study of routers: arms that exist and have equal parameters, differences, page, one real run."""

import json
from pathlib import Path

import pytest

from moetrain.config.compose import compose
from moetrain.config.groups import group_options
from tools.study import routers
from tools.study.pairs import difference, smallest_seen
from tools.study.routers_report import Trained, write_page
from tools.study.runner import read_records


def test_every_router_has_an_arm_and_every_arm_as_many_expert_parameters_as_topk():
    chosen, experts = set(), {}
    for arm in routers.ARMS:
        job = routers.Job(arm, 1, 10)
        chosen.add(compose(job.overrides(())).router["_target_"])
        experts[arm] = job.parameters(())[1]
    targets = {compose([f"router={option}"]).router["_target_"]
               for option in group_options()["router"]}
    assert chosen == targets
    base = experts["topk"]
    assert all(0.85 * base < count <= base for count in experts.values()), experts


def test_intervals_are_those_of_student():
    """Three differences by hand: mean 2, standard deviation 1, t = 4.30 with two degrees of freedom."""
    found = difference([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.30 / 3**0.5) and found.spread == pytest.approx(1)
    assert smallest_seen(1.0, 3) == pytest.approx(found.half) and difference([1.0]) is None


def run_of(arm: str, seed: int, loss: float, step_s: float) -> Trained:
    return Trained(arm, seed, 300, loss, 2.0, 0.5, 1.0, 0.1, step_s, 10**9, 10**6, 5 * 10**5, "corpus", "x")


def test_the_page_pairs_runs_by_seed(tmp_path: Path):
    runs = [run_of("topk", seed, 1 + seed, 1.0 * seed) for seed in (1, 2)]
    runs += [run_of("relu", seed, 1.25 + seed + 0.01 * seed, 3.0 * seed) for seed in (2, 1)]
    write_page(runs, ["topk", "relu", "hash"], tmp_path / "page.md")
    row = next(line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| relu"))
    assert "+0.2650 ± 0.0636" in row and "3.00×" in row
    assert "Not finished: hash." in (tmp_path / "page.md").read_text()
    assert (tmp_path / "page.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_that_has_finished_is_not_trained_again(tmp_path: Path, monkeypatch, capsys):
    for domain, word in (("a", "the cat sat on the mat "), ("b", "0123456789 ")):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for number in range(8):
            (tmp_path / "text" / domain / f"{number}.txt").write_text(f"{number} " + word * 200)
    command = ["routers", "--arms", "topk", "--seeds", "1", "--steps", "2", "--out", str(tmp_path / "out"),
               "--page", str(tmp_path / "page.md"), "--words", f"data.path={tmp_path / 'text'}",
               "model.dim=16", "model.expert_dim=16", "train.seq_len=16", "eval.windows=2"]
    monkeypatch.setattr("sys.argv", command)
    routers.main()
    assert "0 of 1 runs have finished" in capsys.readouterr().out
    routers.main()
    assert "1 of 1 runs have finished; 0 to go" in capsys.readouterr().out
    (found,) = read_records(tmp_path / "out", tmp_path / "page_runs.jsonl")[:1]
    assert found["active"] == 2 and found["loss"] > 0 and json.dumps(found) in (
        tmp_path / "page_runs.jsonl").read_text()
