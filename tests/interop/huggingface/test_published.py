"""Published models have their sizes here, and nothing that they say is lost."""

import json

import pytest

from moetrain.config.sizes import count_parameters
from moetrain.interop.huggingface.families import FAMILIES
from moetrain.interop.huggingface.semantics import semantics
from tests.support.published_configs import PUBLISHED

# Billions of parameters, and of those that a token uses, by the published shapes.
BILLIONS = {
    "mixtral_8x7b": (46.70, 12.88), "qwen3_30b_a3b": (30.53, 3.35), "qwen3_235b_a22b": (235.1, 22.2),
    "olmoe_1b_7b": (6.92, 1.28), "qwen1_5_moe_a2_7b": (14.3, 2.7), "deepseek_v2_lite": (15.7, 2.66),
    "deepseek_v2": (235.7, 21.4), "deepseek_v3": (670.9, 37.4), "glm4_5_air": (106.9, 13.4),
    "gpt_oss_20b": (20.9, 4.19), "gpt_oss_120b": (116.8, 5.71), "granite_3_1b_a400m": (1.33, 0.43),
    "granite_3_3b_a800m": (3.30, 0.88),
}
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
