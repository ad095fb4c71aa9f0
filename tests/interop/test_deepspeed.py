"""engine=deepspeed equals engine=torch: losses, norms, parameters, moments, checkpoints and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import needs, warm_start

needs.module("deepspeed", extra="deepspeed")

from moetrain.config.compose import compose
from moetrain.errors import ConfigErrors
from moetrain.train.state import Run
from moetrain.train.step import train_step
from tests.support.command_line import DEBUG, environment, metrics
from tests.support.ranks import Ranks
from tests.support.training import difference, make_run, whole

STEPS = 6
# Two micro-batches a step, and a limit that clips every gradient.
COMMON = ["run.nproc=2", "train.micro_batch=4", "run.dtype=float32", "train.clip=0.05", "data.min_length=0.3",
          "optim.expert_lr_scale=0.5", "model.num_shared_experts=1"]


@pytest.fixture(scope="module")
def ranks():
    """Ranks of their own: DeepSpeed keeps state per process."""
    with Ranks(2, lasting=True) as two:
        yield two


def started(overrides: list[str]) -> Run:
    from moetrain.interop.deepspeed import wrap_engine

    run = make_run(overrides)
    return wrap_engine(run) if run.config.engine.name == "deepspeed" else run


def steps(run: Run, first: int, last: int) -> list[list[float]]:
    """Metrics of these steps."""
    keys = ("loss/ce", "loss/total", "loss/balance", "grad_norm", "lr", "tokens")
    return [[result.metrics[key] for key in keys]
            for result in (train_step(run, step) for step in range(first, last + 1))]


def held(run: Run) -> dict:
    """Everything that a checkpoint would hold of this rank."""
    return {shard.name: (shard.shape, shard.begin, shard.rows.detach().clone())
            for shard in run.state.state_shards()}


def trained(overrides: list[str]) -> tuple[dict, list[list[float]]]:
    run = started(overrides)
    found = steps(run, 1, STEPS)
    return held(run), found


def assert_close(ours: list, expected: list) -> None:
    """Compare the results of all ranks: metrics to 1e-5, parameters and moments to 1e-4 of their maximum."""
    assert ours[0][1] == ours[1][1]                                            # ranks agree to the last bit
    for mine, its in zip(ours[0][1], expected[0][1], strict=True):
        assert mine == pytest.approx(its, rel=1e-5)
    error, name = difference(whole([state for state, _ in ours]), whole([state for state, _ in expected]))
    assert error <= 1e-4, (name, error)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.full                        # that ZeRO saves and restores: below
def test_what_warm_balance_remembers_is_kept(ranks):
    overrides = [*COMMON, "parallel=ep", "balance.mode=warm", "train.micro_batch=2"]
    expected = ranks.run(trained, overrides)
    assert "prior.counts" in expected[0][0]
    assert_close(ranks.run(trained, [*overrides, "engine=deepspeed"]), expected)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("mode, stage", [
    ("ddp", 1), ("ep", 2),
    *(pytest.param(mode, stage, marks=pytest.mark.full) for mode, stage in (("ddp", 2), ("ep", 1)))])
def test_zero_trains_as_torch_does(ranks, mode, stage):
    overrides = [*COMMON, f"parallel={mode}"]
    expected = ranks.run(trained, overrides)
    assert any(name.startswith("optim.embed.") for name in expected[0][0])
    assert_close(ranks.run(trained, [*overrides, "engine=deepspeed", f"engine.zero_stage={stage}"]), expected)


@pytest.mark.ranks
@pytest.mark.slow
def test_zero_leaves_out_what_is_frozen(ranks):
    overrides = [*COMMON, "parallel=ep", "train.frozen=[embed,layers.0.*,*.router.*]"]
    expected = ranks.run(trained, overrides)
    optimized = [name for name in expected[0][0] if name.startswith("optim.")]
    assert not any("embed" in name or "layers.0" in name for name in optimized)
    assert_close(ranks.run(trained, [*overrides, "engine=deepspeed"]), expected)
    with pytest.raises(AssertionError, match="E-CONFIG-230  engine=deepspeed, and all parameters but"):
        ranks.run(started, [*overrides, "engine=deepspeed", "train.frozen=[embed,head,*norm*,*attention*,"
                                                            "*shared*,*.router.*]"])


@pytest.fixture(scope="module")
def lasting_devices(devices):
    devices(1)                                                                 # skips where there can be none
    with Ranks(2, lasting=True, simulated=True) as two:
        yield two


@pytest.mark.ranks
@pytest.mark.full
@pytest.mark.parametrize("mode, stage", [("ddp", 1), ("ep", 2)])
def test_zero_trains_on_simulated_devices_as_torch_does(lasting_devices, mode, stage):
    overrides = [*COMMON, f"parallel={mode}", "run.device=cuda"]
    expected = lasting_devices.run(trained, overrides)
    assert_close(lasting_devices.run(trained, [*overrides, "engine=deepspeed", f"engine.zero_stage={stage}"]),
                 expected)


def shares(overrides: list[str]) -> tuple[int, int]:
    """Number of moments of dense parameters on this rank, and number of dense parameters."""
    from moetrain.interop.deepspeed import wrap_engine

    run = wrap_engine(make_run(overrides))
    zero = run.state.optimizer.zero
    kept = sum(state["exp_avg"].numel() for state in zero.inner.state.values())
    return kept, sum(parameter.numel() for some in zero.parameters for parameter in some)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_rank_keeps_half_of_the_dense_moments(ranks):
    for kept, parameters in ranks.run(shares, [*COMMON, "parallel=ddp", "engine=deepspeed"]):
        assert parameters / 2 <= kept <= parameters / 2 + 16                   # padding


def run_moetrain(*words: str, cwd: Path, code: int = 0) -> str:
    done = warm_start.run([sys.executable, "-m", "moetrain", *words], cwd=cwd, text=True, timeout=240,
                          env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def interrupted(overrides: list[str], engines: tuple[str, str], directory: Path):
    """Result of `trained` for a run that was saved after half of its steps and resumed by another engine."""
    from moetrain.train.checkpoint.load import resume
    from moetrain.train.checkpoint.save import Saver

    first = started([*overrides, f"engine={engines[0]}"])
    found = steps(first, 1, STEPS // 2)
    saver = Saver(directory, first.mesh, first.config.checkpoint)
    saver.begin(first.state, {}, final=True)
    second = started([*overrides, f"engine={engines[1]}"])
    assert resume(second.state, directory, second.mesh).manifest.values["step"] == STEPS // 2
    found += steps(second, STEPS // 2 + 1, STEPS)
    return held(second), found


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(ranks, tmp_path, stage):
    overrides = [*COMMON, "parallel=ep", f"engine.zero_stage={stage}"]
    unbroken = ranks.run(trained, [*overrides, "engine=deepspeed"])
    broken = ranks.run(interrupted, overrides, ("deepspeed", "deepspeed"), tmp_path)
    for (state, found), (expected, numbers) in zip(broken, unbroken, strict=True):
        assert found == numbers and state.keys() == expected.keys()
        for name, (_, _, rows) in state.items():
            assert torch.equal(rows, expected[name][2]), name


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("engines", [("deepspeed", "torch"), ("torch", "deepspeed")], ids="-".join)
def test_one_engine_goes_on_with_what_the_other_saved(ranks, tmp_path, engines):
    overrides = [*COMMON, "parallel=ep"]
    unbroken = ranks.run(trained, overrides)
    broken = ranks.run(interrupted, overrides, engines, tmp_path)
    assert_close(broken, unbroken)


@pytest.mark.ranks
@pytest.mark.slow
def test_the_command_ends_with_0_and_resumes(tmp_path):
    command = ["train", *DEBUG, "parallel=ep", "run.nproc=2", "log.wandb=off", "engine=deepspeed"]
    run_moetrain(*command, "run.stop_at=5", cwd=tmp_path)
    out = run_moetrain(*command, cwd=tmp_path)
    directory = tmp_path / "runs/debug"
    assert "resumed from step 5" in out and "Traceback" not in out and "built successfully" not in out
    assert [record["step"] for record in metrics(directory)] == list(range(1, 9))
    assert json.loads((directory / "status.json").read_text()) == {"code": 0, "reason": "done", "step": 8}


@pytest.mark.ranks
@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_as_under_torch(tmp_path):
    out = run_moetrain("train", *DEBUG, "parallel=ddp", "run.nproc=2", "log.wandb=off", "engine=deepspeed",
                       "optim.lr=1e30", "optim.warmup=0", cwd=tmp_path, code=11)
    assert "E-NONFINITE-001" in out
    assert json.loads((tmp_path / "runs/debug/status.json").read_text())["code"] == 11


@pytest.mark.parametrize("overrides, number", [(["optim=adamw", "parallel=single"], 67),
                                               (["parallel=ep", "run.nproc=2", "optim=muon"], 68)])
def test_what_zero_cannot_do_is_refused(overrides, number):
    with pytest.raises(ConfigErrors) as caught:
        compose(["engine=deepspeed", *overrides])
    assert [error.id for error in caught.value.errors] == [f"E-CONFIG-{number:03d}"]
