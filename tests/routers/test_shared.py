"""Modules that routers share: one at the model's root, and one of its own for a router without a model."""

import pytest
import torch
from torch import nn

from moetrain.comm.mesh import lone_mesh
from moetrain.config.compose import compose
from moetrain.errors import ConfigError
from moetrain.model.build import meta_model
from moetrain.routers.base import RouterContext
from moetrain.routers.shared import one_of_each
from moetrain.routers.topk import TopKRouter
from tests.support.recurrent_router import RecurrentRouter, tied_cell
from tests.support.training import TINY


def build(convert):
    return meta_model(compose(TINY), 48, lone_mesh(torch.device("cpu")), convert)


def test_the_model_keeps_one_module_of_each_name_and_follows_routers_that_are_replaced():
    shared = build(tied_cell)
    assert list(shared.tied) == ["cell"] and not any("cell" in name for name, _ in
                                                     shared.layers.named_parameters())

    def other_cell(model, config):
        tied_cell(model, config)
        model.tied["cell"] = nn.Identity()

    assert isinstance(build(other_cell).tied["cell"], nn.Identity)

    def plain(model, config):
        tied_cell(model, config)
        for block in model.layers:
            block.moe.router = TopKRouter(dim=16, num_experts=8, top_k=2)

    assert not build(plain).tied


def test_a_router_without_a_model_has_modules_of_its_own():
    router = RecurrentRouter(dim=5, num_experts=4, top_k=2, cell=None)
    router.stand_alone()
    assert router.shared("cell", RouterContext()) is router.alone["cell"]
    tied = {"cell": nn.Identity()}
    assert router.shared("cell", RouterContext(tied=tied)) is tied["cell"]


def test_two_meanings_of_a_name_are_refused():
    assert list(one_of_each([{"a": nn.Linear(2, 3)}, {"a": nn.Linear(2, 3)}, {}])) == ["a"]
    for other in (nn.Linear(3, 2), nn.Bilinear(1, 1, 1), nn.Identity()):
        with pytest.raises(ConfigError, match="two routers share different modules as a"):
            one_of_each([{"a": nn.Linear(2, 3)}, {"a": other}])
