"""Every term of the loss is in the metrics, the same on every mesh."""

import pytest

from tests.integration.training import make_run, snapshot, train_steps, whole
from tests.oracle import oracle_loss

ACCUMULATED = ["run.dtype=float64", "train.micro_batch=4", "data.min_length=0.2", "loss=[z,micro_balance]", "loss.micro_balance.weight=0"]
TERMS = {"loss/weighted/balance", "loss/weighted/z"}


@pytest.mark.ranks
@pytest.mark.parametrize("carrier", ["returned", "attached"])
def test_terms_add_up_to_the_loss_and_do_not_depend_on_the_mesh(ranks, carrier):
    overrides = [*ACCUMULATED, f"train.loss_carrier={carrier}"]
    run = make_run(overrides)
    params = {name.removesuffix(".weight"): tensor for name, tensor in whole([snapshot(run, lambda p: p.data)]).items()}
    batches = [(b.tokens_BS, b.targets_BS, b.valid_BS) for b in run.loader.step(1)]
    total, ce, balance, _ = oracle_loss(params, batches, balance_weight=0.1, z_weight=0.01, num_layers=2, num_heads=4,
                                        num_kv_heads=2, head_dim=4, top_k=2, num_experts=8)
    alone = train_steps(overrides, 2).metrics
    assert alone[0]["loss/z"] == pytest.approx((total - ce - 0.1 * balance).item() / 0.01, abs=1e-8)
    for parallel in ("ep", "fsdp") if carrier == "returned" else ("ep",):
        together = ranks(2).run(train_steps, [*overrides, f"parallel={parallel}", "run.nproc=2"], 2)[1].metrics
        for ours, its in zip(alone, together):
            assert {name for name in ours if name.startswith("loss/weighted/")} == TERMS and "loss/micro_balance" not in ours
            assert ours["loss/ce"] + sum(ours[name] for name in TERMS) == pytest.approx(ours["loss/total"], rel=1e-12)
            assert ours["loss/weighted/balance"] == pytest.approx(0.1 * ours["loss/balance"], rel=1e-12)
            for name in (*TERMS, "loss/z"):
                assert its[name] == pytest.approx(ours[name], rel=1e-10), (parallel, name)
