"""Numbers of routers by the source of their class are those of built models, for every router."""

import pytest
import torch

from moetrain import packages
from moetrain.comm.mesh import lone_mesh
from moetrain.config.compose import compose
from moetrain.config.frozen_sizes import named_parameters
from moetrain.config.router_sizes import layer_router, router_sizes
from moetrain.config.sizes import count_parameters
from moetrain.errors import ConfigError
from moetrain.model.build import meta_model
from moetrain.routers.topk import TopKRouter
from tests.support.any_router import chosen, every_router

OTHERS = pytest.mark.parametrize("words", [
    ["router=recurrent", "router.shared_cell=false"], ["router=recurrent", "router.cell=rnn"],
    ["router=recurrent", "router.cell=identity"], ["router=recurrent", "model.attention=experts"],
    ["router=mlp", "router.kind=linear", "model.block=chain"], ["router=cosine", "router.proj_dim=3"],
    ["router.logit_bias=true", "model.attention=sliced", "model.num_kv_heads=4", "model.num_experts=[4,8]"],
    ["router=hierarchical", "model.attention=experts", "model.num_attention_experts=6", "model.num_heads=4",
     "model.num_kv_heads=4"]], ids=" ".join)


def check(words: list[str]) -> None:
    """Compare every name and number with the model on the meta device."""
    config = compose(["data=synthetic", *words])
    model = meta_model(config, 100, lone_mesh(torch.device("cpu")))
    counted = count_parameters(config.model, 100, config.expert, config.router)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    built = {name: parameter.numel() for name, parameter in model.named_parameters() if of_routers(name)}
    assert {name: numbers for _, name, numbers in named_parameters(config, 100) if of_routers(name)} == built
    router = model.routers["layers.0.moe.0" if config.model.block == "chain" else "layers.0.moe"]
    assert layer_router(config.router, config.model, 0).slots == router.max_slots()


def of_routers(name: str) -> bool:
    return ".router." in name or name.startswith("tied.")


@every_router
def test_numbers_are_those_of_the_model(option: str, overrides: list[str]) -> None:
    check(chosen(option, overrides))


@OTHERS
def test_numbers_of_further_options_are_those_of_the_model(words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize("words, mean", [
    ([], 2), (["router=null_expert", "router.num_null=6", "router.num_copy=2"], 1),
    (["router=expert_choice", "router.capacity=1.5", "eval.allow_noncausal=true"], 1.5),
    (["router=relu", "router.target_k=3.5"], 3.5), (["router=dtop_p"], 2), (["router=top_p"], 0.4 * 8),
    (["router=top_p", "router.k_max=3"], 3)], ids=str)
def test_a_token_takes_as_many_experts_in_the_mean_as_the_class_says(words: list[str], mean: float) -> None:
    config = compose(words)
    one, two = (count_parameters(config.model, 100, config.expert, router)
                for router in (config.router, compose([]).router))
    each = two.active_experts / 2
    assert one.active_experts == round(mean * each)


class DoubtfulRouter(TopKRouter):
    """A router whose sizes have no value."""

    SHAPES = {"weight": ("E", "hidden")}


def test_sizes_without_a_value_are_refused_and_those_of_no_router_are_reported_elsewhere(monkeypatch) -> None:
    monkeypatch.setenv(packages.VARIABLE, "tests")
    target = f"{DoubtfulRouter.__module__}.{DoubtfulRouter.__name__}"
    with pytest.raises(ConfigError, match="E-CONFIG-302"):
        router_sizes({"_target_": target}, dim=4, num_experts=8, top_k=2)
    assert router_sizes({"_target_": "moetrain.nothing"}, dim=4, num_experts=8, top_k=2) == ({}, {}, 2, 2)
