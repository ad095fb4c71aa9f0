"""ModuleFormer's gates: their equations in numpy, dropout and drawn experts."""

from math import erf

import numpy as np
import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.routers.mlp import MLPRouter
from tests.support.any_router import context, router_of, tokens

T = 40


def softmax(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def by_the_release(router: MLPRouter, x: np.ndarray) -> np.ndarray:
    """Probabilities [T, E] without dropout."""
    held = {name: tensor.detach().numpy() for name, tensor in router.state_dict().items()}
    if router.kind == "linear":
        return softmax(x @ held["weight"].T)
    hidden = x @ held["project"].T
    if router.kind == "mlp":
        hidden = hidden + held["bias"]
        return softmax(hidden * 0.5 * (1 + np.vectorize(erf)(hidden / 2 ** 0.5)) @ held["weight"].T)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (hidden, held["weight"])]
    return softmax(np.exp(held["temperature"]) * unit[0] @ unit[1].T)


@pytest.mark.parametrize("kind", ["mlp", "linear", "gmm"])
def test_the_gates_follow_the_release_with_raw_weights(kind):
    router = router_of("mlp", [f"router.kind={kind}"])
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            if name in ("bias", "temperature"):
                parameter.fill_(0.7)
    probs = by_the_release(router, tokens(T).numpy())
    routing = router.route(tokens(T), context(T))
    order = np.argsort(-probs, axis=1)[:, :router.top_k]
    assert routing.ids_TK.tolist() == order.tolist()
    np.testing.assert_allclose(routing.weights_TK.detach().numpy(), np.take_along_axis(probs, order, 1),
                               rtol=1e-12)
    np.testing.assert_allclose(routing.stats.prob_sum_E.detach().numpy(), probs.sum(0), rtol=1e-12)


def test_drawn_experts_are_drawn_from_the_rest_in_training_alone():
    router, plain = router_of("mlp", ["router.sample_topk=2"]), router_of("mlp", [])
    x_TD = tokens(1).expand(4000, -1)
    ids_TK = router.route(x_TD, context(4000)).ids_TK
    still = router.route(x_TD, context(4000, training=False)).ids_TK
    assert still.equal(plain.route(x_TD, context(4000)).ids_TK)
    assert (ids_TK[:, 0] == still[:, 0]).all() and not (ids_TK[:, 1:] == still[:, :1]).any()
    probs_E = plain.scores(x_TD[:1], context(1)).gates_TC[0].detach()
    rest_E = (probs_E + 1e-6).index_fill(0, still[0, :1], 0)
    drawn_E = ids_TK[:, 1].bincount(minlength=8) / 4000
    assert (drawn_E - rest_E / rest_E.sum()).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_dropout_keeps_the_mean_and_is_not_applied_in_evaluation():
    router = router_of("mlp", ["router.dropout=0.25"])
    x_TD = tokens(1).expand(4000, -1)
    dropped = router.logits_of(x_TD, context(4000))
    kept = router.logits_of(x_TD[:1], context(1, training=False))
    assert len(dropped.unique(dim=0)) > 2
    torch.testing.assert_close(dropped.mean(0), kept[0], rtol=0.05, atol=0.05)


def test_more_drawn_experts_than_experts_are_refused():
    with pytest.raises(ConfigError, match="router.sample_topk=4 of model.top_k=3"):
        router_of("mlp", ["router.sample_topk=4"])
