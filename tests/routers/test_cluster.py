"""Routing to centroids: the release's equations in numpy, files of centroids, and refusals."""

import numpy as np
import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.model.initialization import materialize
from moetrain.routers.cluster import ClusterRouter
from tests.support.any_router import context, tokens

T, D, E, K = 40, 5, 6, 2


def build(path, **arguments) -> ClusterRouter:
    with torch.device("meta"):
        router = ClusterRouter(dim=D, num_experts=E, top_k=K, name="layers.1.moe", centroids_path=path,
                               **arguments)
    materialize(router, seed=0, std=0.1, num_layers=2)
    return router


@pytest.fixture
def file(tmp_path) -> str:
    centroids_ED = np.random.default_rng(0).normal(size=(E, D)).astype(np.float32)
    centroids_ED[4] = centroids_ED[1]
    np.savez(tmp_path / "centroids.npz", **{"layers.1.moe": centroids_ED})
    return str(tmp_path / "centroids.npz")


@pytest.mark.parametrize("prefer", ["nearest", "farthest"])
def test_the_choice_follows_distances(prefer, file):
    router, sign = build(file, prefer=prefer), -1 if prefer == "nearest" else 1
    x, centroids = tokens(T).numpy(), np.load(file)["layers.1.moe"].astype(np.float64)
    scores = sign * np.linalg.norm(x[:, None] - centroids, axis=-1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    exp = np.exp(np.take_along_axis(scores, order, 1))
    routing = router.route(tokens(T), context(T))
    assert routing.ids_TK.sort(1).values.tolist() == np.sort(order).tolist()
    np.testing.assert_allclose(routing.weights_TK.numpy(), exp / exp.sum(1, keepdims=True), rtol=1e-9)
    assert not list(router.parameters())


def test_a_token_that_is_two_centroids_chooses_these():
    router = build(None)
    with torch.no_grad():
        router.centroids[4] = router.centroids[1]
    x_TD = router.centroids[[1]].clone().requires_grad_()
    routing = router.route(x_TD, context(1))
    assert routing.ids_TK.tolist() == [[1, 4]]
    routing.weights_TK[0, 0].backward()
    assert x_TD.grad.isfinite().all()


def test_losses_have_no_gradient_at_it_and_the_task_has():
    x_TD = tokens(T).requires_grad_()
    routing = build(None).route(x_TD, context(T))
    assert not routing.stats.prob_sum_E.requires_grad and not routing.stats.lse2_sum.requires_grad
    assert routing.weights_TK.requires_grad


@pytest.mark.parametrize("content, code, said", [
    (None, 264, "there is no such file"), (b"", 264, "EOFError"), (b"no zip at all", 264, "ValueError"),
    ({"layers.0.moe": (E, D)}, 265, "it has layers.0.moe"), ({"layers.1.moe": (E, 4)}, 265, r"\[6, 4\]")])
def test_files_that_are_none_are_refused(content, code, said, tmp_path):
    path = tmp_path / "given.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **{name: np.zeros(shape, np.float32) for name, shape in content.items()})
    with pytest.raises(ConfigError, match=said) as caught:
        build(str(path))
    assert caught.value.id == f"E-CONFIG-{code}" and "tools.centroids" in caught.value.next
