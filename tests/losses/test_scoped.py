"""Losses of sums over a scope: importance, load and first choices, beside their equations in numpy."""

from math import erf

import numpy as np
import pytest
import torch

from moetrain.losses.base import Pooled
from moetrain.losses.first_choice import FirstChoiceLoss
from moetrain.losses.importance import ImportanceLoss
from moetrain.losses.load import LoadLoss
from moetrain.losses.scoped import ScopedLoss
from moetrain.ops.router_sums import Decided, Noise, RouterSums, extra_sums, router_sums

T, E, K = 30, 5, 2


def decided(count: int = T, valid_T: torch.Tensor | None = None) -> tuple[Decided, RouterSums]:
    """Tokens of a router with normal noise, and what all losses need of them; the logits are a leaf."""
    generator = torch.Generator().manual_seed(0)
    logits_TE, drawn_TE = torch.randn(2, T, E, dtype=torch.float64, generator=generator)[:, :count]
    deviation_TE = 0.1 + torch.rand(T, E, dtype=torch.float64, generator=generator)[:count]
    logits_TE = logits_TE.clone().requires_grad_()
    noise = Noise(logits_TE + deviation_TE * drawn_TE, deviation_TE)
    ids_TK = noise.noisy_TC.topk(K).indices
    ids_TK = ids_TK if valid_T is None else ids_TK.where(valid_T[:, None], -1)
    gates_TK = noise.noisy_TC.softmax(-1).gather(1, ids_TK.clamp(min=0))
    made = Decided(logits_TE.softmax(-1), logits_TE, ids_TK, gates_TK, noise)
    forms = {name: form for loss in (ImportanceLoss(), LoadLoss(), FirstChoiceLoss())
             for name, form in loss.token_sums.items()}
    sums = router_sums(made.probs_TC, logits_TE, ids_TK, valid_T)
    return made, sums._replace(extra=extra_sums(forms, made, valid_T))


def pooled(sums: RouterSums, tokens: int) -> Pooled:
    return Pooled(sums.counts_E, torch.tensor(tokens),
                  {name: total.detach().double() for name, total in sums.named().items()})


def cv_squared(sums_E: np.ndarray) -> float:
    return (np.std(sums_E) / np.mean(sums_E)) ** 2


def phi(number: float) -> float:
    return (1 + erf(number / 2 ** 0.5)) / 2


def load_of_shazeer(made: Decided) -> np.ndarray:
    """P(x, i) = Phi((z_i - kth_excluding(H, k, i)) / deviation_i), summed over tokens."""
    load_E = np.zeros(E)
    for z_E, h_E, deviation_E in zip(made.logits_TC.tolist(), *(part.tolist() for part in made.noise)):
        for i in range(E):
            kth_excluding = sorted(h_E[:i] + h_E[i + 1:], reverse=True)[K - 1]
            load_E[i] += phi((z_E[i] - kth_excluding) / deviation_E[i])
    return load_E


def load_of_v_moe(made: Decided) -> np.ndarray:
    """1 - Phi((threshold - z_i) / deviation_i) of the k-th largest noisy logit, summed over tokens."""
    load_E = np.zeros(E)
    for z_E, h_E, deviation_E in zip(made.logits_TC.tolist(), *(part.tolist() for part in made.noise)):
        threshold = sorted(h_E, reverse=True)[K - 1]
        load_E += [1 - phi((threshold - z) / deviation) for z, deviation in zip(z_E, deviation_E)]
    return load_E


def value(loss: ScopedLoss, sums: RouterSums, whole: RouterSums | None = None, tokens: int = T) -> float:
    return loss.value(sums, pooled(sums if whole is None else whole, tokens)).item()


def test_values_are_those_of_the_papers():
    made, sums = decided()
    gates_E, first_E = np.zeros(E), np.zeros(E)
    for ids_K, gates_K in zip(made.ids_TK.tolist(), made.weights_TK.tolist()):
        first_E[ids_K[0]] += 1
        gates_E[ids_K] += gates_K
    probs_E = made.probs_TC.detach().numpy().sum(0)
    assert value(ImportanceLoss(), sums) == pytest.approx(cv_squared(gates_E))
    assert value(ImportanceLoss(of="probabilities"), sums) == pytest.approx(cv_squared(probs_E))
    assert value(FirstChoiceLoss(), sums) == pytest.approx(E * (first_E / T * probs_E / T).sum())
    assert value(LoadLoss(), sums) == pytest.approx(cv_squared(load_of_shazeer(made)))
    (form,) = LoadLoss(threshold="kth").token_sums.values()
    np.testing.assert_allclose(form(made).detach().numpy(), load_of_v_moe(made))


@pytest.mark.parametrize("loss, name", [
    (ImportanceLoss(), "importance_E"), (ImportanceLoss(of="probabilities"), "prob_sum_E"),
    (LoadLoss(), "load_E")], ids=["gates", "probabilities", "load"])
@pytest.mark.parametrize("scope", ["global", "micro"])
def test_the_gradient_is_that_of_the_squared_coefficient_of_variation(loss, name, scope):
    loss = type(loss)(scope=scope, **({"of": "probabilities"} if name == "prob_sum_E" else {}))
    made, sums = decided()
    total_E = sums.named()[name]
    ours, its = (torch.autograd.grad(each, made.logits_TC, retain_graph=True)[0] for each in (
        loss.value(sums, pooled(sums, T)), total_E.var(unbiased=False) / total_E.mean() ** 2))
    torch.testing.assert_close(ours, its)
    assert ours.any() and (loss.pool is None) == (scope == "micro") == (not loss.pooled_sums)


def test_a_micro_batch_of_its_own_weighs_as_much_as_its_tokens():
    _, part = decided(10)
    loss = ImportanceLoss(scope="micro")
    assert value(loss, part) == pytest.approx(value(loss, part, tokens=10) / 3)


def test_equal_sums_cost_nothing_one_expert_costs_most_and_no_token_is_finite():
    _, sums = decided()
    for importance_E, expected in ((torch.ones(E), 0), (E * torch.eye(E)[2], E - 1), (torch.zeros(E), 0)):
        leaf_E = importance_E.double().requires_grad_()
        told = sums._replace(extra={"importance_E": leaf_E})
        found = ImportanceLoss().value(told, pooled(told, T))
        assert found.item() == pytest.approx(expected)
        (grad_E,) = torch.autograd.grad(found, leaf_E)
        assert grad_E.isfinite().all()


def test_padding_has_no_load_and_noise_that_is_none_counts():
    valid_T = torch.arange(T) < 20
    _, padded = decided(valid_T=valid_T)
    _, clean = decided(20)
    for name in ("importance_E", "load_E", "first_E"):
        torch.testing.assert_close(padded.extra[name], clean.extra[name])
    made, sums = decided()
    (form,) = LoadLoss().token_sums.values()
    for noise in (None, Noise(made.noise.noisy_TC, torch.zeros(T, E, dtype=torch.float64))):
        torch.testing.assert_close(form(made._replace(noise=noise)).detach(), sums.counts_E.double())


def test_every_expert_is_chosen_again_where_a_token_takes_all():
    made, _ = decided()
    ids_TK = made.noise.noisy_TC.sort(descending=True).indices
    (form,) = LoadLoss().token_sums.values()
    torch.testing.assert_close(form(made._replace(ids_TK=ids_TK)).detach(), torch.full((E,), 30.0).double())
