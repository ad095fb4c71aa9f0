"""Capacity limits of experts.

The survivors are those of a plain loop, weights keep their gradient, the split of the batch changes nothing.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from moetrain.config.compose import compose
from moetrain.model.activation_checkpointing import recomputed
from moetrain.moe.capacity import (
    CapacityPolicy,
    PositionCapacity,
    PriorityCapacity,
    ProbCapacity,
    RandomCapacity,
    place_in_queue,
)
from moetrain.ops.counts import count_ids
from moetrain.ops.gating import used_first
from moetrain.ops.keyed_random import bits
from moetrain.ops.router_sums import router_sums
from moetrain.routers.base import RouterContext, Routing
from moetrain.train.step import train_step
from tests.support.oracle import oracle_logits, oracle_loss
from tests.support.training import Trained, alone, difference, make_run, snapshot, train_steps, union, whole

E, K, S = 4, 2, 9
POLICIES = {
    "position": partial(PositionCapacity, num_experts=E),
    "token": partial(PositionCapacity, num_experts=E, order="token"),
    "prob": partial(ProbCapacity, num_experts=E),
    "priority": partial(PriorityCapacity, num_experts=E),
    "random": partial(RandomCapacity, num_experts=E),
}


def routed(tokens: int, *, seed: int = 0, ties: bool = False,
           ragged: bool = False) -> tuple[Routing, RouterContext]:
    """Routing of sequences of S tokens that prefers the first experts; the last token of each is padding."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, E, dtype=torch.float64, generator=generator) - torch.arange(E)
    logits_TE = (logits_TE.round() if ties else logits_TE).requires_grad_()
    probs_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = (part[:, :K] for part in probs_TE.sort(descending=True, stable=True))
    positions_T = torch.arange(tokens) % S
    used_TK = (positions_T != S - 1)[:, None].expand(-1, K)
    if ragged:
        used_TK = used_TK & (torch.arange(K) < torch.randint(0, K + 1, (tokens, 1), generator=generator))
    ids_TK, weights_TK = ids_TK.where(used_TK, -1), weights_TK.where(used_TK, 0)
    stats = router_sums(probs_TE, logits_TE, ids_TK, None)
    return Routing(ids_TK, weights_TK, ids_TK.numel(), stats), RouterContext(
        router="layers.0.moe", sample_ids_T=torch.arange(tokens) // S, positions_T=positions_T)


def part_of(context: RouterContext, tokens: slice) -> RouterContext:
    return context._replace(positions_T=context.positions_T[tokens],
                            sample_ids_T=context.sample_ids_T[tokens])


def survivors_by_loop(routing: Routing, context: RouterContext, policy: str, factor: float, at_least: int,
                      together: bool = False) -> list[list[int]]:
    """Ids that each token keeps. One slot after the other takes a place at its expert, while there is one."""
    ids, weights = routing.ids_TK.tolist(), routing.weights_TK.tolist()
    drawn = bits(context, K, use="capacity").tolist()
    sequence, number = [], -1
    for position in context.positions_T.tolist():
        number += position == 0
        sequence.append(0 if together else number)
    kept = [[-1] * K for _ in ids]
    for scope in set(sequence):
        slots = [(t, k) for t, row in enumerate(ids)
                 for k, e in enumerate(row) if e >= 0 and sequence[t] == scope]
        capacity = at_least
        while capacity < factor * len(slots) / E - 1e-9:
            capacity += 1
        places = {e: capacity for e in range(E)}
        order = {"position": lambda s: (s[1], s[0]), "token": lambda s: s,
                 "prob": lambda s: (-weights[s[0]][s[1]], s),
                 "priority": lambda s: (s[1], -max(weights[s[0]]), s[0]),
                 "random": lambda s: drawn[s[0]][s[1]]}
        for t, k in sorted(slots, key=order[policy]):
            if places[ids[t][k]] > 0:
                places[ids[t][k]] -= 1
                kept[t][k] = ids[t][k]
    return [sorted(row, key=lambda e: e < 0) for row in kept]


# --- who survives


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("factor, at_least", [(1.0, 0), (1.1, 0), (0.3, 2), (0.1, 0), (2.0, 1)])
@pytest.mark.parametrize("kind", ["plain", "ties", "ragged", "local"])
def test_the_survivors_are_those_of_a_loop(policy, factor, at_least, kind):
    routing, context = routed(5 * S, ties=kind == "ties", ragged=kind == "ragged")
    scope = "local" if kind == "local" else "sequence"
    limited = POLICIES[policy](factor=factor, min_capacity=at_least, scope=scope).apply(routing, context)
    expected = survivors_by_loop(routing, context, policy, factor, at_least, together=scope == "local")
    assert limited.ids_TK.tolist() == expected
    kept = sum(e >= 0 for row in expected for e in row)
    assert (limited.stats.dropped == routing.stats.active_sum - kept
            and (factor > 1.5 or limited.stats.dropped > 0))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_token_keeps_the_weight_of_what_it_keeps(policy):
    routing, context = routed(4 * S)
    limited = POLICIES[policy](factor=0.8, min_capacity=1).apply(routing, context)
    of_expert = [dict(zip(ids, weights))
                 for ids, weights in zip(routing.ids_TK.tolist(), routing.weights_TK.tolist())]
    moved = 0
    for t, (ids, weights) in enumerate(zip(limited.ids_TK.tolist(), limited.weights_TK.tolist())):
        assert weights == [of_expert[t][e] if e >= 0 else 0 for e in ids]
        assert ids == sorted(ids, key=lambda e: e < 0)                        # used slots first
        moved += ids[0] >= 0 and ids[0] == routing.ids_TK[t, 1]
    # Some second choices moved to the front
    assert moved > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_no_expert_takes_more_than_its_capacity_in_any_sequence(policy):
    routing, context = routed(6 * S)
    limited = POLICIES[policy](factor=1.0, min_capacity=0).apply(routing, context)
    for ids_SK in limited.ids_TK.split(S):
        # Its mean load, and some expert is full
        assert count_ids(ids_SK, E).max() == (S - 1) * K / E


@pytest.mark.parametrize("policy", POLICIES)
def test_a_factor_of_experts_over_choices_drops_nothing(policy):
    routing, context = routed(3 * S)
    limited = POLICIES[policy](factor=E / K, min_capacity=0, renorm=True).apply(routing, context)
    assert limited.ids_TK.equal(routing.ids_TK) and limited.weights_TK.equal(routing.weights_TK)
    assert limited.stats.dropped == 0


@pytest.mark.parametrize("dtype, noise", [(torch.float64, 1e-15), (torch.float32, 1e-7)], ids=str)
def test_rounding_does_not_decide_between_equal_tokens(dtype, noise):
    """A sequence that begins with one token several times: the same weights, but for the last bits."""
    ids_TK, weights_TK = torch.tensor([[0, 1]] * 6), torch.tensor([[0.6, 0.4]] * 6, dtype=dtype)
    made, context = POLICIES["prob"](factor=1.0, min_capacity=0), RouterContext(positions_T=torch.arange(6))
    expected = made.survivors(ids_TK, weights_TK, context)
    assert expected.tolist() == [[True, True]] * 3 + [[False, False]] * 3
    for seed in range(5):
        other_TK = weights_TK + noise * torch.randn(
            6, 2, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        assert made.survivors(ids_TK, other_TK, context).equal(expected)


def test_the_heaviest_survive():
    routing, context = routed(4 * S)
    limited = POLICIES["prob"](factor=0.6, min_capacity=1).apply(routing, context)
    for sequence in range(4):
        part = slice(sequence * S, (sequence + 1) * S)
        for e in range(E):
            weights = {t: w for t in range(part.start, part.stop) for i, w in
                       zip(routing.ids_TK[t].tolist(), routing.weights_TK[t].tolist()) if i == e}
            kept = {t for t in weights if e in limited.ids_TK[t].tolist()}
            assert all(weights[t] >= weights[other] for t in kept for other in weights.keys() - kept)


def test_random_places_are_fair_and_another_step_draws_others():
    """12 tokens choose one expert that takes 3 of them: each is taken in a quarter of 2,000 steps."""
    ids_TK, weights_TK = torch.zeros(12, 1, dtype=torch.int64), torch.ones(12, 1)
    made = RandomCapacity(num_experts=E, factor=1.0, min_capacity=0)
    context = RouterContext(router="layers.0.moe", sample_ids_T=torch.zeros(12, dtype=torch.int64),
                            positions_T=torch.arange(12))
    taken_T = sum(made.survivors(ids_TK, weights_TK, context._replace(step=step))[:, 0].double()
                  for step in range(2000))
    assert taken_T.sum() == 3 * 2000
    assert (taken_T / 2000 - 0.25).abs().max() < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_a_micro_batch_that_runs_twice_counts_each_time_by_itself():
    """As with two passes of one batch that draw for themselves (RouterContext.draws)."""
    routing, context = routed(2 * S)
    twice = routing._replace(ids_TK=routing.ids_TK.repeat(2, 1), weights_TK=routing.weights_TK.repeat(2, 1))
    made = POLICIES["position"](factor=0.5, min_capacity=0, scope="local")
    once = made.apply(routing, context).ids_TK
    again = context._replace(positions_T=context.positions_T.repeat(2), draws=2)
    assert (once != routing.ids_TK).any() and made.apply(twice, again).ids_TK.equal(once.repeat(2, 1))


def later_token_matters(policy: CapacityPolicy, slots: slice) -> bool:
    """Whether what later tokens choose can change which of an earlier token's slots survive."""
    for seed in range(20):
        (routing, context), (other, _) = routed(S, seed=seed), routed(S, seed=seed + 100)
        for t in range(1, S):
            mixed = routing._replace(ids_TK=torch.cat([routing.ids_TK[:t], other.ids_TK[t:]]),
                                     weights_TK=torch.cat([routing.weights_TK[:t], other.weights_TK[t:]]))
            kept = [policy.survivors(r.ids_TK, r.weights_TK.detach(), context)[:t, slots]
                    for r in (routing, mixed)]
            if not kept[0].equal(kept[1]):
                return True
    return False


def test_position_is_causal_for_first_choices_and_in_order_of_tokens_for_all():
    tight = {"factor": 0.8, "min_capacity": 1}
    assert not later_token_matters(POLICIES["position"](**tight), slice(0, 1))
    assert not later_token_matters(POLICIES["token"](**tight), slice(0, K))
    # A later first choice comes before
    assert later_token_matters(POLICIES["position"](**tight), slice(1, K))
    for policy in ("prob", "priority"):
        assert later_token_matters(POLICIES[policy](**tight), slice(0, K))


# --- where it counts


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sequence_keeps_the_same_whatever_it_is_batched_with(policy):
    routing, context = routed(4 * S)
    made = POLICIES[policy](factor=1.0, min_capacity=1)
    together = made.apply(routing, context).ids_TK
    for part in (slice(0, S), slice(S, 3 * S), slice(3 * S, 4 * S)):
        piece = routing._replace(ids_TK=routing.ids_TK[part], weights_TK=routing.weights_TK[part])
        alone_ids = made.apply(piece, part_of(context, part)).ids_TK
        assert alone_ids.equal(together[part])
    local = POLICIES[policy](factor=1.0, min_capacity=1, scope="local")
    together, alone_ids = local.apply(routing, context).ids_TK, []
    for first in range(0, 4 * S, S):
        part = slice(first, first + S)
        piece = routing._replace(ids_TK=routing.ids_TK[part], weights_TK=routing.weights_TK[part])
        alone_ids.append(local.apply(piece, part_of(context, part)).ids_TK)
    assert not torch.cat(alone_ids).equal(together)


def test_a_sample_that_occurs_twice_is_two_sequences():
    routing, context = routed(2 * S)
    twice = context._replace(sample_ids_T=torch.full((2 * S,), 7))
    made = POLICIES["position"](factor=1.0)
    assert made.apply(routing, twice).ids_TK.equal(made.apply(routing, context).ids_TK)


def test_tokens_without_positions_are_one_sequence():
    routing, context = routed(S)
    made = POLICIES["position"](factor=0.7, min_capacity=1)
    assert made.apply(routing, RouterContext()).ids_TK.equal(made.apply(routing, context).ids_TK)


def test_evaluation_has_a_factor_of_its_own():
    routing, context = routed(4 * S)
    made = POLICIES["position"](factor=0.5, eval_factor=1.0, min_capacity=0)
    evaluated = made.apply(routing, context._replace(training=False))
    assert evaluated.ids_TK.equal(
        POLICIES["position"](factor=1.0, min_capacity=0).apply(routing, context).ids_TK)
    assert evaluated.stats.dropped < made.apply(routing, context).stats.dropped


@pytest.mark.parametrize("policy", POLICIES)
def test_no_tokens_and_no_used_slots_are_no_trouble(policy):
    for tokens, ids in ((0, None), (S, -1)):
        routing, context = routed(tokens)
        routing = routing if ids is None else routing._replace(
            ids_TK=torch.full((S, K), ids), weights_TK=torch.zeros(S, K))
        limited = POLICIES[policy](renorm=True).apply(routing, context)
        assert (limited.ids_TK == -1).all() and not limited.weights_TK.any() and limited.stats.dropped == 0


# --- weights and statistics


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("renorm", [False, True])
def test_weights_and_gradients_are_those_of_a_dense_mask(policy, renorm):
    routing, context = routed(3 * S)
    limited = POLICIES[policy](factor=0.5, min_capacity=1, renorm=renorm).apply(routing, context)
    kept_TE = (limited.ids_TK[:, :, None] == torch.arange(E)).any(1).double()
    before_TE = torch.zeros_like(kept_TE).scatter_add(1, routing.ids_TK.clamp(min=0), routing.weights_TK)
    after_TE = before_TE * kept_TE
    if renorm:
        after_TE = after_TE * (before_TE.sum(1) / after_TE.sum(1).where(kept_TE.any(1), 1))[:, None]
    ours_TE = torch.zeros_like(kept_TE).scatter_add(1, limited.ids_TK.clamp(min=0), limited.weights_TK)
    torch.testing.assert_close(ours_TE, after_TE)
    lost_T = (limited.ids_TK < 0).all(1) & (routing.ids_TK >= 0).any(1)
    assert lost_T.any() and not limited.weights_TK[lost_T].any()
    if renorm:
        torch.testing.assert_close(limited.weights_TK.sum(1)[~lost_T], routing.weights_TK.sum(1)[~lost_T])
    scale_TE = torch.rand(3 * S, E, dtype=torch.float64)
    ours, truth = (torch.autograd.grad((weights_TE * scale_TE).sum(), routing.weights_TK, retain_graph=True)
                   for weights_TE in (ours_TE, after_TE))
    torch.testing.assert_close(ours, truth)


def test_statistics_are_those_before_drops():
    routing, context = routed(3 * S)
    limited = POLICIES["prob"](factor=0.5, min_capacity=0).apply(routing, context)
    for name, value in routing.stats._asdict().items():
        assert name == "dropped" or getattr(limited.stats, name) is value, name
    assert limited.stats.dropped > 0 == routing.stats.dropped


class Fickle(PositionCapacity):
    """Puts the last slots first when it is asked a second time."""

    asked = 0

    def priority(self, weights_TK: Tensor, context: RouterContext) -> Tensor:
        self.asked += 1
        order_N = super().priority(weights_TK, context)
        return order_N.flip(0) if self.asked > 1 else order_N


def test_a_recompute_reweighs_the_slots_that_were_kept():
    routing, context = routed(3 * S)
    weights_TK = routing.weights_TK.detach().requires_grad_()
    steady, fickle = (cls(num_experts=E, factor=0.6, min_capacity=1, renorm=True)
                      for cls in (PositionCapacity, Fickle))

    def weigh(weights: Tensor, policy: CapacityPolicy) -> Tensor:
        limited = policy.apply(routing._replace(weights_TK=weights), context)
        return limited.weights_TK * (limited.ids_TK + 1).sin()

    scale_TK = torch.rand(3 * S, K, dtype=torch.float64)
    (truth,) = torch.autograd.grad(weigh(weights_TK, steady), weights_TK, scale_TK)
    out_TK = recomputed("full")(weigh, weights_TK, fickle)
    (ours,) = torch.autograd.grad(out_TK, weights_TK, scale_TK)
    assert fickle.asked == 2
    torch.testing.assert_close(ours, truth)


def test_places_and_used_slots_by_hand():
    assert place_in_queue(torch.tensor([3, 1, 3, -1, 1, 3])).tolist() == [0, 0, 1, 0, 1, 2]
    assert (used_first(torch.tensor([[-1, 4, -1, 2], [1, -1, 0, -1]])).tolist()
            == [[4, 2, -1, -1], [1, 0, -1, -1]])


def test_what_depends_on_the_split_says_so():
    assert POLICIES["prob"]().describe() == "prob, factor 1.25 (evaluation 2), at least 4, per sequence"
    local = PositionCapacity(num_experts=E, scope="local")
    assert local.describe().endswith("per micro-batch of a rank   depends on: ranks, accumulation")
    assert CapacityPolicy().describe() == "dropless" and not CapacityPolicy().depends_on


# --- training


BASE = ["run.dtype=float64", "data.min_length=0.2"]
TIGHT = [*BASE, "capacity.factor=1.1", "capacity.min_capacity=1"]


@pytest.mark.parametrize("options, oracle", [
    (["capacity=position"], {"policy": "position"}),
    (["capacity=position", "capacity.order=token", "capacity.renorm=true"],
     {"policy": "token", "renorm": True}),
    (["capacity=prob", "capacity.renorm=true", "router=sigmoid", "router.scale=2"],
     {"policy": "prob", "renorm": True}),
    (["capacity=priority"], {"policy": "priority"}),
    (["capacity=prob", "capacity.scope=local", "router.weights=raw"], {"policy": "prob", "together": True}),
], ids=["position", "token-renorm", "prob-renorm-sigmoid", "priority", "prob-local-raw"])
def test_a_step_gives_what_the_oracle_gives(options, oracle):
    run = make_run([*options, *TIGHT, "train.clip=0"])
    start = whole([snapshot(run, lambda p: p.data)])
    params = {name.removesuffix(".weight"): tensor.requires_grad_() for name, tensor in start.items()}
    batches = [(b.tokens_BS, b.targets_BS, b.valid_BS) for b in run.loader.step(1)]
    sigmoid = "router=sigmoid" in options
    model = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, top_k=2, num_experts=8,
                 sigmoid=sigmoid,
                 scale=2.0 if sigmoid else 1.0, gate="raw" if "router.weights=raw" in options else "renorm",
                 capacity={"factor": 1.1, "at_least": 1, **oracle})
    total, ce, balance, counts = oracle_loss(params, batches, balance_weight=0.1, z_weight=0.01, **model)
    total.backward()
    layers = [layer for batch in batches for layer in oracle_logits(params, batch[0], batch[2], **model)[1]]
    dropped = sum(int((layer.chosen_TE & ~layer.kept_TE).sum()) for layer in layers)
    result = train_step(run, 1)
    ours = {name.removesuffix(".weight"): gradient
            for name, gradient in whole([snapshot(run, lambda p: p.grad)]).items()}
    error, name = difference(ours, {name: p.grad if p.grad is not None else torch.zeros_like(p)
                                    for name, p in params.items()})
    assert error < 1e-10, (name, error)
    for key, value in (("loss/total", total), ("loss/ce", ce), ("loss/balance", balance)):
        assert abs(result.metrics[key] - value.item()) < 1e-10, key
    for layer, count in enumerate(counts):
        assert result.counts[f"layers.{layer}.moe"].equal(count)
    assert (dropped > 0
            and result.metrics["moe/drop_fraction"] == dropped / sum(int(count.sum()) for count in counts))


def drops(trained: Trained) -> list[float]:
    return [metrics["moe/drop_fraction"] for metrics in trained.metrics]


@pytest.mark.ranks
@pytest.mark.parametrize("policy, mesh, accumulation",
                         [("position", "ddp", 2), ("prob", "ep", 1), ("position", "ep", 4)])
def test_two_ranks_drop_what_one_drops(ranks, policy, mesh, accumulation):
    overrides = [f"capacity={policy}", *TIGHT]
    single = alone(overrides, 4)
    split = union(ranks(2).run(train_steps, [*overrides, f"parallel={mesh}", "run.nproc=2",
                                             f"train.micro_batch={8 // accumulation}"], 4))
    for ours, truth in ((split.parameters, single.parameters), (split.gradients, single.gradients)):
        error, name = difference(ours, truth)
        assert error < 1e-10, (name, error)
    assert drops(split) == drops(single) and min(drops(single)) > 0


def test_accumulation_changes_what_is_dropped_only_where_it_says_so():
    whole_batch, split = (alone(["capacity=prob", *TIGHT, f"train.micro_batch={size}"], 2)
                          for size in (16, 2))
    assert drops(whole_batch) == drops(split)
    assert difference(split.parameters, whole_batch.parameters)[0] < 1e-10
    local = [alone(["capacity=prob", *TIGHT, "capacity.scope=local", f"train.micro_batch={size}"], 2)
             for size in (16, 2)]
    assert drops(local[0]) != drops(local[1])


def test_dropless_is_the_default_and_a_roomy_capacity_equals_it():
    assert compose([]).capacity == {"_target_": "moetrain.moe.capacity.CapacityPolicy"}
    dropless, roomy = alone(BASE, 2), alone([*BASE, "capacity=position", "capacity.factor=4"], 2)
    assert drops(dropless) == drops(roomy) == [0, 0]
    assert difference(roomy.parameters, dropless.parameters)[0] == 0
