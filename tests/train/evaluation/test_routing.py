"""Records of log.routing: their sums by hand, on every mesh, and what a forced router looks like."""

import numpy as np
import pytest
import torch

from moetrain.runs.routing_record import RoutingRecord, collapsed_routers, summary
from moetrain.train.evaluation.evaluate import Evaluation, evaluate
from moetrain.train.evaluation.routing import INPUTS, shuffled, spread
from moetrain.train.micro_batches import step_context
from tests.support.training import FORCED, make_run

WORDS = ["log.routing=true", "run.dtype=float64", "eval.windows=3", "eval.batch=4", "data.min_length=0.5",
         "capacity=position", "capacity.eval_factor=1", "capacity.min_capacity=1"]


def evaluated(words: list[str] = [], forced: dict[str, list[int]] | None = None) -> Evaluation:
    run = make_run([*WORDS, *words], forced)
    return evaluate(run.state.model, run.dataset, run.mesh, run.config, step=3)


def close(one: RoutingRecord, other: RoutingRecord) -> None:
    for name, array in one._asdict().items():
        theirs = getattr(other, name)
        assert np.asarray(array).dtype == np.asarray(theirs).dtype, name
        if np.asarray(array).dtype.kind == "f":
            np.testing.assert_allclose(array, theirs, rtol=1e-10, err_msg=name)
        else:
            np.testing.assert_array_equal(array, theirs, err_msg=name)


def test_the_sums_are_those_of_the_decisions() -> None:
    """A window at a time, from what routers append to `RouterContext.decisions`, in numpy."""
    record, run = evaluated().routing, make_run(WORDS)
    run.state.model.eval()
    windows = np.concatenate([run.dataset.heldout_ids(part, 3) for part in range(len(run.dataset.measured))])
    ids, previous, positions = (np.zeros_like(table) for table in (record.ids, record.previous,
                                                                   record.positions))
    pairs, firsts = np.zeros_like(record.pairs[0, 1]), []
    for window in windows:
        batch, decisions = run.dataset.batch(np.array([window])), []
        context = step_context(run.config.run.seed, 3, batch, training=False)._replace(decisions=decisions)
        with torch.no_grad():
            run.state.model(batch.tokens_BS, context)
        tokens = batch.tokens_BS[0].tolist()
        for t in range(int(batch.valid_BS.sum())):
            of_routers = [decision.ids_TK[t].tolist() for decision in decisions]
            for r, experts in enumerate(of_routers):
                ids[r, tokens[t], experts] += 1
                positions[r, t, experts] += 1
                if t:
                    previous[r, tokens[t - 1], experts] += 1
            pairs[of_routers[0][0], of_routers[1][0]] += 1
        firsts.append(np.stack([decision.ids_TK[:, 0].numpy() for decision in decisions]))
    for name, ours in (("ids", ids), ("previous", previous), ("positions", positions)):
        np.testing.assert_array_equal(getattr(record, name), ours, err_msg=name)
    np.testing.assert_array_equal(record.pairs[0, 1], pairs)
    np.testing.assert_array_equal(record.first, np.concatenate(firsts, axis=1))
    active = np.unpackbits(record.active, axis=-1)
    assert (active.sum(-1)[record.first >= 0] == 2).all() and not active[record.first < 0].any()
    assert record.by_domain.sum() == record.chosen[0].sum() == 2 * 2 * record.tokens[0]
    assert record.dropped.any() and (record.unrouted <= record.tokens[:, None]).all()


def test_what_is_measured_does_not_depend_on_batches_and_leaves_losses_alone() -> None:
    found, other = evaluated(), evaluated(["eval.batch=5"])
    close(found.routing, other.routing)
    plain = evaluated(["log.routing=false"])
    assert plain.routing is None and plain.losses == found.losses
    assert torch.equal(plain.choices_ML, found.choices_ML)


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["ep", "fssdp"])
def test_every_mesh_records_the_same(ranks, mode: str) -> None:
    found = ranks(2).run(evaluated, [f"parallel={mode}", "run.nproc=2", "train.micro_batch=8"])
    close(evaluated().routing, found[0].routing)
    close(found[0].routing, found[1].routing)


def test_a_router_that_one_expert_takes_over_is_named() -> None:
    record = evaluated(forced=FORCED).routing
    assert list(collapsed_routers(record)) == ["layers.0.moe", "layers.1.moe"]
    assert summary(record)["moe/routing/largest_share"] == 1 and summary(record)["moe/routing/token"] == 0
    assert (record.spread[:, 0] < 1e-9).all() and (record.spread[:, 1] > 0).all()


def test_nothing_is_dropped_where_an_expert_may_take_every_slot() -> None:
    assert not evaluated(["capacity.eval_factor=4"]).routing.dropped.any()


def test_choices_that_are_no_experts_leave_tokens_without_one() -> None:
    """Null experts (AdaMoE): they are in no table, and a token that takes nothing else is counted."""
    record = evaluated(["router=null_expert", "capacity.eval_factor=8"]).routing
    assert record.experts.tolist() == [8, 8] and record.ids.shape[-1] == 8
    without = (record.first < 0).sum(1) - (record.first.shape[1] - record.tokens[0])
    assert record.unrouted[0].tolist() == without.tolist() and without.min() > 0


def test_shifted_input_has_the_same_tokens_in_another_order() -> None:
    run = make_run(WORDS)
    batch = run.dataset.batch(run.dataset.heldout_ids(0, 3))
    context = step_context(0, 3, batch, training=False)
    tokens_BS = shuffled(batch, context)
    assert len(INPUTS) == 2 and not torch.equal(tokens_BS, batch.tokens_BS)
    for ours, theirs, valid in zip(tokens_BS, batch.tokens_BS, batch.valid_BS):
        assert ours[valid].sort().values.tolist() == theirs[valid].sort().values.tolist()
        assert not ours[~valid].any()
    assert torch.equal(tokens_BS, shuffled(batch, context._replace(step=9)))


def test_the_spread_between_groups_is_that_of_their_means() -> None:
    draw = np.random.default_rng(0)
    x, group = draw.normal(size=(30, 4)) + 5, draw.integers(0, 3, 30)
    rows = np.concatenate([x, (x ** 2).sum(1, keepdims=True), np.ones((30, 1))], 1)
    sums = np.stack([rows[group == g].sum(0) for g in range(4)])         # one group is empty
    means = np.stack([x[group == g].mean(0) for g in group])
    assert spread(sums) == pytest.approx((((means - x.mean(0)) ** 2).sum(), ((x - x.mean(0)) ** 2).sum()))
