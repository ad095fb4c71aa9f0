"""engine=deepspeed gives what engine=torch gives: losses, norms, parameters, moments, checkpoints, exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from moetrain.config.compose import compose
from moetrain.errors import ConfigErrors
from tests.integration.test_command_line import DEBUG, environment, metrics, numbers, weights
from tests.integration.training import difference, make_run, snapshot, whole
from tests.ranks import Ranks

STEPS = 6
# Two micro-batches a step, and a limit that clips every gradient.
COMMON = ["run.nproc=2", "train.micro_batch=4", "run.dtype=float32", "train.clip=0.05", "data.min_length=0.3",
          "optim.expert_lr_scale=0.5", "model.num_shared_experts=1"]


@pytest.fixture(scope="module")
def ranks():
    """Ranks of their own: DeepSpeed keeps state per process."""
    with Ranks(2) as two:
        yield two


def trained(overrides: list[str]):
    """(parameters, moments, numbers) of a few steps, on this rank."""
    from moetrain.interop.deepspeed import adopt
    from moetrain.train.step import train_step

    run = make_run(overrides)
    if run.config.engine.name == "deepspeed":
        run = adopt(run)
    keys = ("loss/ce", "loss/total", "loss/balance", "grad_norm", "lr", "tokens")
    found = [[result.metrics[key] for key in keys] for result in (train_step(run, step) for step in range(1, STEPS + 1))]
    state = {piece.name: (piece.shape, piece.begin, piece.rows.clone()) for piece in run.state.pieces()}
    assert {name for name in state if name.startswith("model.")} == {f"model.{name}" for name in snapshot(run, lambda p: p.data)}
    return state, found


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("mode", ["ddp", "ep"])
def test_zero_trains_as_torch_does(ranks, mode, stage):
    overrides = [*COMMON, f"parallel={mode}"]
    ours = ranks.run(trained, overrides)
    zeros = ranks.run(trained, [*overrides, "engine=deepspeed", f"engine.zero_stage={stage}"])
    for mine, theirs in zip(ours[0][1], zeros[0][1], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)
    assert zeros[0][1] == zeros[1][1]                                          # ranks agree to the last bit
    error, name = difference(whole([state for state, _ in zeros]), whole([state for state, _ in ours]))
    assert error <= 1e-4, (name, error)                                        # moments included


def shares(overrides: list[str]) -> tuple[int, int]:
    """(numbers of dense moments that this rank keeps, dense parameters)."""
    from moetrain.interop.deepspeed import adopt

    run = adopt(make_run(overrides))
    zero = run.state.optimizer.zero
    kept = sum(state["exp_avg"].numel() for state in zero.inner.state.values())
    return kept, sum(parameter.numel() for some in zero.parameters for parameter in some)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_rank_keeps_half_of_the_dense_moments(ranks):
    for kept, parameters in ranks.run(shares, [*COMMON, "parallel=ddp", "engine=deepspeed"]):
        assert parameters / 2 <= kept <= parameters / 2 + 16                   # padding


def run_moetrain(*words: str, cwd: Path, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "moetrain", *words], cwd=cwd, text=True, timeout=240, env=environment(),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_either_engine_goes_on_with_it(tmp_path):
    common = ["train", *DEBUG, "parallel=ep", "run.nproc=2", "log.wandb=off"]
    zero = [*common, "engine=deepspeed"]
    run_moetrain(*zero, "run.name=whole", cwd=tmp_path)
    run_moetrain(*zero, "run.name=broken", "run.stop_at=5", cwd=tmp_path)
    shutil.copytree(tmp_path / "runs/broken", tmp_path / "runs/changed")
    out = run_moetrain(*zero, "run.name=broken", cwd=tmp_path)
    whole_run, broken, changed = (tmp_path / "runs" / name for name in ("whole", "broken", "changed"))
    assert "resumed from step 5" in out and "Traceback" not in out
    assert numbers(broken) == numbers(whole_run) and len(numbers(broken)) == 8
    assert weights(broken) == weights(whole_run)
    assert json.loads((broken / "status.json").read_text()) == {"code": 0, "reason": "done", "step": 8}
    run_moetrain(*common, "run.name=changed", cwd=tmp_path)                    # engine=torch
    for mine, theirs in zip(metrics(changed), metrics(whole_run), strict=True):
        assert mine["loss/ce"] == pytest.approx(theirs["loss/ce"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert metrics(changed)[0].keys() == metrics(whole_run)[0].keys()


@pytest.mark.ranks
@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_as_under_torch(tmp_path):
    out = run_moetrain("train", *DEBUG, "parallel=ddp", "run.nproc=2", "log.wandb=off", "engine=deepspeed", "optim.lr=1e30",
                       "optim.warmup=0", cwd=tmp_path, code=11)
    assert "E-NONFINITE-001" in out
    assert json.loads((tmp_path / "runs/debug/status.json").read_text())["code"] == 11


@pytest.mark.parametrize("overrides, number", [(["parallel=single"], 67), (["parallel=ep", "run.nproc=2", "optim=muon"], 68)])
def test_what_zero_cannot_do_is_refused(overrides, number):
    with pytest.raises(ConfigErrors) as caught:
        compose(["engine=deepspeed", *overrides])
    assert [error.id for error in caught.value.errors] == [f"E-CONFIG-{number:03d}"]
