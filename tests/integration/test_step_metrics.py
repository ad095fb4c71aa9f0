"""What the metrics of a step say: every term of the loss, the same on every mesh, and the slowest rank."""

import time

import pytest

from moetrain.train.loggers.stopwatch import PHASES
from tests.support.oracle import oracle_loss
from tests.support.training import make_run, snapshot, train_run, train_steps, whole

ACCUMULATED = ["run.dtype=float64", "train.micro_batch=4", "data.min_length=0.2", "loss=[z,micro_balance]",
               "loss.micro_balance.weight=0"]
TERMS = {"loss/weighted/balance", "loss/weighted/z"}


@pytest.mark.ranks
@pytest.mark.parametrize("way", ["added", "injected"])
def test_terms_add_up_to_the_loss_and_do_not_depend_on_the_mesh(ranks, way):
    overrides = [*ACCUMULATED, f"train.aux_loss={way}"]
    run = make_run(overrides)
    params = {name.removesuffix(".weight"): tensor
              for name, tensor in whole([snapshot(run, lambda p: p.data)]).items()}
    batches = [(b.tokens_BS, b.targets_BS, b.valid_BS) for b in run.loader.step(1)]
    total, ce, balance, _ = oracle_loss(params, batches, balance_weight=0.1, z_weight=0.01, num_layers=2,
                                        num_heads=4,
                                        num_kv_heads=2, head_dim=4, top_k=2, num_experts=8)
    alone = train_steps(overrides, 2).metrics
    assert alone[0]["loss/z"] == pytest.approx((total - ce - 0.1 * balance).item() / 0.01, abs=1e-8)
    for parallel in ("ep", "fsdp") if way == "added" else ("ep",):
        together = ranks(2).run(
            train_steps, [*overrides, f"parallel={parallel}", "run.nproc=2"], 2)[1].metrics
        for ours, its in zip(alone, together):
            assert ({name for name in ours if name.startswith("loss/weighted/")} == TERMS
                    and "loss/micro_balance" not in ours)
            assert (ours["loss/ce"] + sum(ours[name] for name in TERMS)
                    == pytest.approx(ours["loss/total"], rel=1e-12))
            assert ours["loss/weighted/balance"] == pytest.approx(0.1 * ours["loss/balance"], rel=1e-12)
            for name in (*TERMS, "loss/z"):
                assert its[name] == pytest.approx(ours[name], rel=1e-10), (parallel, name)


def with_a_slow_rank(slow: int, overrides: list[str]) -> list[dict[str, float]]:
    """Metrics of two steps in which one rank takes 50 ms longer to read its data."""
    run = make_run(overrides)
    read = run.loader.step

    def step(number: int):
        if run.mesh.rank == slow:
            time.sleep(0.05)
        return read(number)

    run.loader.step = step
    return train_run(run, 2).metrics


@pytest.mark.ranks
def test_the_slowest_and_the_fastest_rank_of_a_phase_are_known(ranks):
    found = ranks(2).run(with_a_slow_rank, 1, ["parallel=ddp", "run.nproc=2", "train.micro_batch=8"])
    timed = {f"time/{phase}/{end}" for phase in PHASES for end in ("min", "max")} | {"time/slowest_rank"}
    for first, second in zip(*found):                    # the same on every rank
        assert {name: first[name] for name in timed} == {name: second[name] for name in timed}
    for rank, metrics in enumerate(found):
        assert metrics[0]["time/optim/max"] == 0 and metrics[1]["time/optim/min"] > 0
        for phase in ("data", "forward", "backward"):
            assert (metrics[1][f"time/{phase}/min"] <= metrics[1][f"time/{phase}"]
                    <= metrics[1][f"time/{phase}/max"])
    optim = [metrics[0]["time/optim"] for metrics in found]
    assert (found[0][1]["time/optim/min"], found[0][1]["time/optim/max"]) == (min(optim), max(optim))
    assert not timed & set(train_steps([], 1).metrics[0])
