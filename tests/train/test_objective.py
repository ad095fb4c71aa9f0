"""The loss of a step: one definition, whatever the split."""

import pytest
import torch
from torch import Tensor, nn

from moetrain.config.compose import compose
from moetrain.errors import ConfigError
from moetrain.losses.base import Pooled, PoolRule
from moetrain.losses.language import cross_entropy_sum
from moetrain.losses.load_balance import LoadBalanceLoss
from moetrain.losses.z import ZLoss
from moetrain.ops.gating import top_k
from moetrain.ops.router_sums import RouterSums, router_sums
from moetrain.routers.stack import stacks
from moetrain.train.metrics import pool
from moetrain.train.objective import Objective, build_objective


class Learned(ZLoss, nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        ZLoss.__init__(self)
        self.sharpness = nn.Parameter(torch.ones(1))


class Unweighted(ZLoss):
    """A loss that forgets a member which the objective reads."""

    def __init__(self) -> None:
        self.weight = 1.0


class Unpooled(ZLoss):
    """A loss of pooled sums that does not say over what they are pooled."""

    pooled_sums = ("prob_sum_E",)


class PooledWarm(Unpooled):
    """A loss of pooled sums that the previous step would have to stand for."""

    pool = PoolRule("global", "warm")


@pytest.mark.parametrize("cls, number", [(Unweighted, 239), (Unpooled, 240), (PooledWarm, 237)])
def test_a_loss_that_would_be_wrong_or_fail_later_is_refused(cls, number: int, monkeypatch) -> None:
    given = {"loss": cls, "balance": LoadBalanceLoss}
    monkeypatch.setattr("moetrain.train.objective.build", lambda node, family: given[family]())
    with pytest.raises(ConfigError) as refused:
        build_objective(compose(["loss=[z]"]), 1)
    assert refused.value.id == f"E-CONFIG-{number}"


def test_a_loss_with_parameters_is_refused(monkeypatch) -> None:
    """Nobody would train them."""
    monkeypatch.setattr("moetrain.train.objective.build", lambda node, family: Learned())
    with pytest.raises(ConfigError, match="the loss balance owns parameters"):
        build_objective(compose(["experiment=debug"]), 2)


ROUTERS = ("layers.0.moe", "layers.1.moe")


class Constant:
    """A loss whose value is known, and that remembers what it was asked for."""

    pool = None

    def __init__(self, weight: float, values: list[float], reduction: str = "mean") -> None:
        self.weight, self.values, self.reduction = weight, iter(values), reduction

    def value(self, stats: RouterSums, pooled: Pooled) -> Tensor:
        return torch.tensor([next(self.values) for _ in stats.tokens])


def stats_of(logits_TE: Tensor) -> RouterSums:
    probs_TE = logits_TE.softmax(-1)
    return router_sums(probs_TE, logits_TE, top_k(probs_TE, 2)[1], None)


def test_cross_entropy_is_a_sum_in_nats_over_real_targets():
    logits_BSV = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets_BS = torch.tensor([[0, -1, 4], [-1, -1, 2]])
    value = cross_entropy_sum(logits_BSV, targets_BS)
    log_p = logits_BSV.log_softmax(-1)
    truth = -(log_p[0, 0, 0] + log_p[0, 2, 4] + log_p[1, 2, 2])
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits_BSV, retain_graph=True)
                                 for v in (value, truth)))


def test_a_micro_batch_of_padding_costs_nothing():
    logits_BSV = torch.randn(1, 2, 5, requires_grad=True)
    value = cross_entropy_sum(logits_BSV, torch.full((1, 2), -1))
    value.backward()
    assert value.item() == 0 and not logits_BSV.grad.any()


def test_bfloat16_logits_are_summed_in_float32():
    logits_BSV = torch.randn(1, 4, 5).bfloat16()
    targets_BS = torch.tensor([[0, 1, 2, 3]])
    value = cross_entropy_sum(logits_BSV, targets_BS)
    assert value.dtype == torch.float32 and value.equal(cross_entropy_sum(logits_BSV.float(), targets_BS))


@pytest.mark.parametrize("reduction, share", [("mean", 2), ("sum", 1)])
def test_a_loss_is_weighted_and_reduced_over_routers(reduction, share):
    objective = Objective({"balance": Constant(0.5, [1.0, 4.0], reduction)}, 2)
    together = stacks(dict.fromkeys(ROUTERS, stats_of(torch.randn(3, 4))))
    found = objective.share(torch.tensor(6.0), together, [Pooled(torch.zeros(2, 4), torch.tensor(3))],
                            torch.tensor(3))
    assert found.total.item() == pytest.approx(6 / 3 + 0.5 * 5 / share)
    assert ({name: term.item() for name, term in found.terms.items()}
            == {"balance": pytest.approx(0.5 * 5 / share)})


def test_a_loss_of_weight_zero_is_never_asked_and_a_dense_model_has_none():
    six, two = torch.tensor(6.0), torch.tensor(2)
    stack = stacks({ROUTERS[0]: stats_of(torch.randn(3, 4))})
    for objective, of in ((Objective({"balance": Constant(0.0, [])}, 1), stack),
                          (Objective({"balance": Constant(1.0, [])}, 0), [])):
        assert objective.share(six, of, [], two) == (3, {}) and objective.weights == {}


def test_every_router_is_weighed_by_its_own_slots_per_token():
    """Hugging Face's normalization, in one stack of routers with other numbers of choices."""
    logits_TE = [torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    parts = [router_sums(logits.softmax(-1), logits, top_k(logits, slots)[1], None)
             for logits, slots in zip(logits_TE, (1, 3))]
    objective = Objective({"balance": LoadBalanceLoss(weight=1.0, normalization="huggingface")}, 2)
    tokens = torch.tensor(6)
    pooled = pool(torch.cat([part.counts_E for part in parts]), {"a": 5, "b": 5}, tokens)
    total = objective.share(torch.tensor(0.0), stacks({"a": parts[0], "b": parts[1]}), pooled, tokens).total
    truth = [5 * (part.counts_E / 6 * part.prob_sum_E / 6).sum() for part in parts]
    assert total.item() == pytest.approx(sum(truth).item() / 2, rel=1e-6)


def test_a_loss_that_adds_routers_up_is_refused():
    class Wrong(LoadBalanceLoss):
        def value(self, stats: RouterSums, pooled: Pooled) -> Tensor:
            return super().value(stats, pooled).sum()

    with pytest.raises(AssertionError, match="of 2 routers"):
        Objective({"wrong": Wrong()}, 2).share(torch.tensor(0.0),
                                               stacks(dict.fromkeys(ROUTERS, stats_of(torch.randn(3, 4)))),
                                            [Pooled(torch.ones(2, 4), torch.tensor(3))], torch.tensor(3))


def test_no_tokens_at_all_is_zero_and_not_nan():
    assert Objective({}, 0).share(torch.tensor(0.0), [], [], torch.tensor(0)).total.item() == 0


def test_the_pool_is_needed_as_soon_as_one_loss_needs_it():
    assert Objective({"balance": LoadBalanceLoss(), "z": ZLoss()}, 1).pool == ("global", "exact")
    assert Objective({"balance": LoadBalanceLoss(scope="micro"), "z": ZLoss()}, 1).pool is None
    assert Objective({"balance": LoadBalanceLoss(mode="warm"), "micro": LoadBalanceLoss(scope="micro")},
                     1).pool == ("global", "warm")


@pytest.mark.parametrize("experts", [[4, 4], [4, 6], [4, 6, 6, 4]], ids=str)
@pytest.mark.parametrize("sizes", [[8], [4, 4], [1, 0, 7]], ids=str)
def test_shares_of_any_split_add_up_in_value_and_gradient(sizes, experts):
    generator = torch.Generator().manual_seed(0)
    routers = {f"layers.{layer}.moe": E for layer, E in enumerate(experts)}
    router_TE = [torch.randn(8, E, dtype=torch.float64, generator=generator).requires_grad_()
                 for E in experts]
    logits_TV = torch.randn(8, 5, dtype=torch.float64, generator=generator).requires_grad_()
    targets_T = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    objective = Objective({"balance": LoadBalanceLoss(weight=0.3), "z": ZLoss(weight=0.2)}, len(experts))
    tokens = torch.tensor(8)
    counts = [stats_of(logits).counts_E for logits in router_TE]
    pooled = pool(torch.cat(counts), routers, tokens)

    total = torch.zeros((), dtype=torch.float64)
    for part in torch.arange(8).split(sizes):
        of = stacks({name: stats_of(logits[part]) for name, logits in zip(routers, router_TE)})
        total = total + objective.share(cross_entropy_sum(logits_TV[part][None], targets_T[part][None]),
                                        of, pooled, tokens).total

    balance = [E * (counts_E / 16 * logits.softmax(-1).mean(0)).sum()
               for E, counts_E, logits in zip(experts, counts, router_TE)]
    z = [logits.exp().sum(-1).log().square().mean() for logits in router_TE]
    truth = (torch.nn.functional.cross_entropy(logits_TV, targets_T)
             + 0.3 * sum(balance) / len(experts) + 0.2 * sum(z) / len(experts))
    torch.testing.assert_close(total, truth)
    leaves = (*router_TE, logits_TV)
    torch.testing.assert_close(*(torch.autograd.grad(value, leaves) for value in (total, truth)))
