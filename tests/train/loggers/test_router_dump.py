"""Router dumps suffice to recompute the numbers of a step, by the programs in docs/reference/files.md."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from moetrain.train.step import train_step
from tests.support.training import make_run

FILES = Path(__file__).parents[3] / "docs" / "reference" / "files.md"
# Two ranks, two micro-batches.
TWO_BY_TWO = ["parallel=ep", "run.nproc=2", "train.micro_batch=4", "data.min_length=0.3", "run.dtype=float64"]


def programs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", FILES.read_text().split("## Router dumps")[1].split("\n## ")[0],
                      re.DOTALL)


def dumped(overrides: list[str], directory: Path,
           per_node: int = 2) -> list[tuple[dict[str, float], dict[str, list[int]]]]:
    """(metrics, counts) of four steps."""
    before, os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE"), str(per_node)
    try:
        run = make_run([*overrides, "log.router_dump=true"])
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE") if before is None else os.environ.update(LOCAL_WORLD_SIZE=before)
    run.dump.directory = directory
    found = []
    for step in range(1, 5):
        result = train_step(run, step)
        run.dump.write(step)
        found.append((result.metrics, {name: counts.tolist() for name, counts in result.counts.items()}))
    return found


def steps_of(path: Path) -> list[Path]:
    found = sorted(path.iterdir())
    assert [directory.name for directory in found] == [f"step-{step:08d}" for step in (1, 2, 3)]
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("overrides", [[], ["train.activation_checkpointing=full", "train.count_pass=true"]],
                         ids=["kept", "recomputed"])
def test_a_stranger_computes_the_same_numbers(ranks, tmp_path, overrides):
    truth = ranks(2).run(dumped, [*TWO_BY_TWO, *overrides], tmp_path)[0]
    program = programs()[0]
    for directory, (metrics, counts) in zip(steps_of(tmp_path), truth):
        done = subprocess.run([sys.executable, "-c", program, str(directory)], capture_output=True, text=True,
                              check=True)
        assert float(done.stdout) == pytest.approx(metrics["loss/balance"], rel=1e-12)
        ids = [ids for file in directory.iterdir() for name, ids in load_file(file).items()
               if name.endswith("layers.1.moe/ids")]
        assert len(ids) == 4
        assert ([sum(int((part == expert).sum()) for part in ids) for expert in range(8)]
                == counts["layers.1.moe"])


@pytest.mark.ranks
@pytest.mark.parametrize(
    "scope, mode", [*(("global", mode) for mode in ("exact", "sync", "buffer", "warm")), ("node", "exact"),
                                         ("node", "buffer"), ("micro", "exact"), ("sequence", "exact")])
def test_a_stranger_computes_what_was_trained_on(ranks, tmp_path, scope, mode):
    overrides = [*TWO_BY_TWO, f"balance={scope}", f"balance.mode={mode}", "balance.weight=0.3",
                 "loss.z.weight=0", *(["balance.drift=1"] if mode == "warm" else [])]
    truth = ranks(2).run(dumped, overrides, tmp_path, 1)[0]
    for directory, (metrics, _) in zip(steps_of(tmp_path), truth):
        printed = run_program(programs()[1], [str(directory), scope, mode, "1"])
        assert printed == pytest.approx((metrics["loss/total"] - metrics["loss/ce"]) / 0.3, rel=1e-10)


def run_program(program: str, arguments: list[str]) -> float:
    """In this process, for time's sake."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *arguments])
        exec(program, {})
    return float(printed.getvalue())


@pytest.mark.ranks
def test_a_stranger_computes_the_other_metrics_of_routers(ranks, tmp_path):
    truth = ranks(2).run(dumped, TWO_BY_TWO, tmp_path)[0]
    for directory, (metrics, _) in zip(steps_of(tmp_path), truth):
        entropies, local, counts = [], [], {}
        for file in directory.iterdir():
            tensors = load_file(file)
            for name in (name for name in tensors if name.endswith("logits")):
                number, router, _ = name.split("/")
                logits = tensors[name][tensors[f"{number}/valid"] == 1]
                probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
                entropies.append(-(probs * np.log(probs)).sum(1))
                loads = np.bincount(tensors[f"{number}/{router}/ids"].flatten() + 1, minlength=9)[1:]
                local.append(loads.max() / loads.mean() - 1)
                counts[router] = counts.get(router, 0) + loads
        violations = [loads.max() / loads.mean() - 1 for loads in counts.values()]
        assert len(local) == 8 and 0.1 < metrics["moe/entropy"] < np.log(8)
        for name, truth in (("entropy", np.concatenate(entropies).mean()),
                            ("local_max_violation/mean", np.mean(local)),
                            ("max_violation/mean", np.mean(violations)),
                            ("max_violation/max", np.max(violations)),
                            ("dead_experts", sum((loads == 0).sum() for loads in counts.values()))):
            assert metrics[f"moe/{name}"] == pytest.approx(truth, rel=1e-12), name


@pytest.mark.ranks
def test_domains_of_sequences_are_there(ranks, tmp_path):
    """Experts by domain, as trained on."""
    ranks(2).run(dumped, TWO_BY_TWO, tmp_path)
    run = make_run([*TWO_BY_TWO[2:]])
    for step, directory in enumerate(steps_of(tmp_path), 1):
        expected = {int(sample): int(domain) for batch in run.loader.step(step)
                    for sample, domain in zip(batch.sample_ids_B, batch.domains_B)}
        found = {}
        for file in directory.iterdir():
            with safe_open(file, "numpy") as opened:
                assert json.loads(opened.metadata()["domains"]) == list(run.dataset.domains)
                assert opened.metadata()["ranks"] == "2"
            tensors = load_file(file)
            for turn in ("0", "1"):
                found |= dict(zip(tensors[f"{turn}/samples"].tolist(), tensors[f"{turn}/domains"].tolist()))
        assert found == expected and len(set(found.values())) > 1


@pytest.mark.ranks
def test_a_step_that_fewer_ranks_train_again_has_files_of_these_alone(ranks, tmp_path):
    ranks(2).run(dumped, TWO_BY_TWO, tmp_path)
    ((metrics, _), *_) = dumped(TWO_BY_TWO[2:], tmp_path)
    first = steps_of(tmp_path)[0]
    assert [file.name for file in first.iterdir()] == ["rank-0000.safetensors"]
    assert run_program(programs()[0], [str(first)]) == pytest.approx(metrics["loss/balance"], rel=1e-12)
