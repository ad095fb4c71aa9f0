"""Centroids by k-means: of clusters that are there, and of a trained run, which a router then takes."""

from pathlib import Path

import numpy as np
import torch

from moetrain.__main__ import main as moetrain
from moetrain.model.initialization import materialize
from moetrain.routers.base import RouterContext
from moetrain.routers.cluster import ClusterRouter
from tools.centroids import kmeans, main


def test_kmeans_finds_clusters_and_is_a_fixed_point():
    generator = torch.Generator().manual_seed(0)
    centers_ED = 10 * torch.eye(4, 6)
    points_ND = (centers_ED[:, None] + 0.1 * torch.randn(4, 50, 6, generator=generator)).flatten(0, 1)
    found_ED = kmeans(points_ND, 4)
    nearest_E = torch.cdist(found_ED, centers_ED).argmin(1)
    assert sorted(nearest_E.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(found_ED, centers_ED[nearest_E], atol=0.1, rtol=0)
    twice_ND = torch.ones(5, 3)
    assert kmeans(twice_ND, 2).equal(torch.ones(2, 3))       # fewer different points than clusters


def test_a_run_that_has_lost_its_file_gives_the_centroids_of_the_next_one(tmp_path, monkeypatch):
    """The checkpoint has the centroids, so that evaluation, by which the tool sees tokens, needs no file."""
    monkeypatch.chdir(tmp_path)
    centroids_ED = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    np.savez("first.npz", **{"layers.0.moe": centroids_ED})
    assert moetrain([
        "train", "experiment=debug", "run.steps=1", "model.num_layers=1", "model.num_experts=4",
        "model.dim=32", "router=cluster", "balance=none", "log.wandb=off", "run.name=first",
        "router.centroids_path=first.npz"]) == 0
    Path("first.npz").unlink()
    main(["first", "second.npz", "--tokens", "300", "--experts", "3", "eval.windows=4"])
    with torch.device("meta"):
        router = ClusterRouter(dim=32, num_experts=3, top_k=1, name="layers.0.moe",
                               centroids_path="second.npz")
    materialize(router, seed=0, std=0.1, num_layers=1)
    x_TD = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nearest_T = torch.cdist(x_TD, router.centroids).argmin(1)
    assert router.route(x_TD, RouterContext()).ids_TK[:, 0].equal(nearest_T)
