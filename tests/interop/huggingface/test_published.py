"""Published models have their sizes here, and nothing that they say is lost."""

import json
from dataclasses import replace

import pytest
import torch

from moetrain.comm.mesh import lone_mesh
from moetrain.config.compose import compose
from moetrain.config.sizes import count_parameters
from moetrain.interop.huggingface.families import FAMILIES
from moetrain.interop.huggingface.semantics import semantics
from moetrain.model.build import meta_model
from tests.support.published_configs import PUBLISHED

# Billions of parameters, and of those that a token uses, by the published shapes.
BILLIONS = {
    "mixtral_8x7b": (46.70, 12.88), "qwen3_30b_a3b": (30.53, 3.35), "qwen3_235b_a22b": (235.1, 22.2),
    "olmoe_1b_7b": (6.92, 1.28), "qwen1_5_moe_a2_7b": (14.3, 2.7), "deepseek_v2_lite": (15.7, 2.66),
    "deepseek_v2": (235.7, 21.4), "deepseek_v3": (670.9, 37.4), "glm4_5_air": (106.9, 13.4),
    "gpt_oss_20b": (20.9, 4.19), "gpt_oss_120b": (116.8, 5.71), "granite_3_1b_a400m": (1.33, 0.43),
    "granite_3_3b_a800m": (3.30, 0.88), "phi_3_5_moe": (41.87, 6.64),
}
VOCABULARIES = {**{name: file["vocab_size"] for name, file in PUBLISHED.items()}, "phi_3_5_moe": 32064}
KNOWN = [name for name, file in PUBLISHED.items() if file["model_type"] in FAMILIES]


@pytest.mark.parametrize("name", KNOWN)
def test_a_published_model_has_its_size_and_keeps_its_file(name: str) -> None:
    file = {**PUBLISHED[name], "unknown": {"kept": True}}
    family = FAMILIES[file["model_type"]]
    config = family.bare_config(file)
    counted = count_parameters(config.model, file["vocab_size"], config.expert)
    assert (counted.total / 1e9, counted.active / 1e9) == pytest.approx(BILLIONS[name], rel=8e-3)
    assert family.refusals(config) == []
    assert json.dumps(family.write_config(config, file["vocab_size"], file)) == json.dumps(file)
    again = family.bare_config(family.from_config(config, file["vocab_size"]))
    assert semantics(again) == semantics(config)


@pytest.mark.parametrize("name", KNOWN)
def test_an_option_of_the_group_model_says_what_the_file_says(name: str) -> None:
    """But for the vocabulary, which is that of the user's tokenizer."""
    file = {**PUBLISHED[name], "vocab_size": None}
    theirs, ours = FAMILIES[file["model_type"]].bare_config(file), compose([f"model={name}"])
    assert semantics(ours) == semantics(theirs)


@pytest.mark.parametrize("name", BILLIONS)
def test_an_option_of_the_group_model_has_the_published_number_of_parameters(name: str, request) -> None:
    """All layers are built without memory with --all, else the first four of them."""
    whole = compose([f"model={name}"])
    layers = whole.model.num_layers if request.config.getoption("--all") else 4
    config = replace(whole, model=replace(whole.model, num_layers=layers))
    model = meta_model(config, VOCABULARIES[name], lone_mesh(torch.device("cpu")))
    built, counted = (count_parameters(each.model, VOCABULARIES[name], each.expert, each.router)
                      for each in (config, whole))
    assert sum(parameter.numel() for parameter in model.parameters()) == built.total
    assert (counted.total / 1e9, counted.active / 1e9) == pytest.approx(BILLIONS[name], rel=8e-3)
