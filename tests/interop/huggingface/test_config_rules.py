"""Keys of config.json: spellings old and new, defaults of families, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest

from moetrain.config.schema import Config, DenoisingConfig
from moetrain.config.yaml_file import load
from moetrain.errors import ConfigErrors
from moetrain.interop.huggingface.families import FAMILIES
from moetrain.interop.huggingface.semantics import SIGMOID, TOPK
from tests.support.package_source import ROOT
from tests.support.published_configs import PUBLISHED

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 8,
    "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 128,
    "torch_dtype": "bfloat16", "transformers_version": "4.36.0"}
QWEN: dict[str, Any] = {
    **MIXTRAL, "model_type": "qwen3_moe", "moe_intermediate_size": 8, "num_experts": 8, "head_dim": 16,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


def without(file: dict[str, Any], *keys: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in file.items() if name not in keys} | changes


def bare(file: dict[str, Any]) -> Config:
    return FAMILIES[file["model_type"]].bare_config(file)


@pytest.mark.parametrize("file, new", [
    (MIXTRAL, without(MIXTRAL, "rope_theta",
                      rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    (QWEN, without(QWEN, "num_experts", num_local_experts=8)),
    (QWEN, without(QWEN, "mlp_only_layers", mlp_only_layers=None)),
    (without(QWEN, decoder_sparse_step=2), without(QWEN, mlp_only_layers=[0])),
], ids=["rope", "experts", "null", "layers"])
def test_spellings_of_one_model_are_one_config(file: dict[str, Any], new: dict[str, Any]) -> None:
    family = FAMILIES[file["model_type"]]
    assert family.from_config(bare(file), 1) == family.from_config(bare(new), 1)


def test_a_file_stays_as_it_is_but_for_what_is_no_longer_true() -> None:
    file = without(QWEN, "num_experts", "rope_theta", num_local_experts=8, unknown={"kept": [1]},
                   rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    family, config = FAMILIES["qwen3_moe"], bare(file)
    assert json.dumps(family.write_config(config, 32000, file)) == json.dumps(file)
    fewer = replace(config, model=replace(config.model, num_experts=6, rope_theta=5.0))
    written = family.write_config(fewer, 32000, file)
    assert written == {**without(file, "num_local_experts", "rope_parameters"), "num_experts": 6,
                       "rope_theta": 5.0, "rope_scaling": None}
    assert family.write_config(config, 40000, file) == {**file, "vocab_size": 40000}


def test_a_file_of_another_family_lends_nothing() -> None:
    family, config = FAMILIES["qwen3_moe"], bare(QWEN)
    assert family.write_config(config, 9, {**MIXTRAL, "unknown": 1}) == family.from_config(config, 9)


@pytest.mark.parametrize("changes, named", [
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"hidden_size": "wide"}, "hidden_size='wide'"),
    ({"hidden_size": None}, "no hidden_size"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "rope_parameters"),
])
def test_values_without_counterpart_are_named_together(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        bare({**MIXTRAL, **changes, "num_experts_per_tok": True})
    assert named in str(caught.value) and "num_experts_per_tok=True" in str(caught.value)


# Changes of a model that Mixtral holds: the key that stands in the way then.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"router": {"_target_": SIGMOID}}, "router._target_"),
    ({"router": {"_target_": TOPK, "weights": "raw"}}, "router.weights"),
    ({"router": {"_target_": TOPK, "num_groups": 2, "topk_groups": 1}}, "router.num_groups"),
    ({"router": {"_target_": TOPK, "balance": "quantile"}}, "router.balance"),
    ({"router": {"_target_": TOPK, "noise": "normal"}}, "router.noise"),
    ({"router": {"_target_": TOPK, "scale": 2.0}}, "router.scale"),
    ({"router": {"_target_": TOPK, "logit_bias": True}}, "router.logit_bias"),
    ({"router": {"_target_": "my.own.Router"}}, "router._target_"),
    ({"expert": {"_target_": "moetrain.moe.normalized_expert.NormalizedExpert"}}, "expert._target_"),
    ({"capacity": {"_target_": "moetrain.moe.capacity.Prob"}}, "capacity"),
    ({"denoising": DenoisingConfig({"s_25": 1.0})}, "denoising.rates"),
    ({"block": "latent"}, "model.block"), ({"block": "chain"}, "model.block"),
    ({"attention": "experts"}, "model.attention"), ({"qk_norm": True}, "model.qk_norm"),
    ({"num_shared_experts": 1}, "model.num_shared_experts"), ({"expert_dim": [8, 16]}, "model.expert_dim"),
    ({"num_experts": [4, 8]}, "model.num_experts"), ({"first_dense_layers": 1}, "model.moe_layers"),
]


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """A config with other sections or other sizes."""
    sections = {name: value for name, value in changes.items() if hasattr(config, name)}
    sizes = {name: value for name, value in changes.items() if name not in sections}
    return replace(config, model=replace(config.model, **sizes), **sections)


@pytest.mark.parametrize("changes, key", REFUSED, ids=[f"{n}_{key}" for n, (_, key) in enumerate(REFUSED)])
def test_what_a_family_cannot_say_is_refused_by_its_key(changes: dict[str, Any], key: str) -> None:
    found = FAMILIES["mixtral"].refusals(changed(bare(MIXTRAL), changes))
    assert key in [name for name, _ in found] and all(why for _, why in found)


def test_every_part_of_another_name_is_refused() -> None:
    """Each option of router, expert and capacity that is no part of the family stands in the way."""
    for section, own in (("router", ("topk",)), ("expert", ("swiglu",)), ("capacity", ("none",))):
        for option in sorted((ROOT / "conf" / section).glob("*.yaml")):
            node = load(option)
            found = FAMILIES["mixtral"].refusals(replace(bare(MIXTRAL), **{section: node}))
            assert bool(found) == (option.stem not in own), (option, found)


def test_what_acts_in_training_alone_does_not_stand_in_the_way() -> None:
    config = changed(bare(MIXTRAL), {"moe_layers": "every_1", "router": {
        "_target_": TOPK, "jitter_eps": 0.1, "noise": "gumbel", "weights": "softmax_of_topk"}})
    assert FAMILIES["mixtral"].refusals(config) == []
    jittered = replace(config, router={**config.router, "jitter_scope": "layer"})
    assert FAMILIES["mixtral"].from_config(jittered, 9)["router_jitter_noise"] == 0.1


def test_modules_behind_the_last_layer_are_kept_as_they_are() -> None:
    family, config = FAMILIES["deepseek_v3"], bare({**PUBLISHED["deepseek_v3"], "num_hidden_layers": 4})
    assert family.preserved("model.layers.4.eh_proj.weight", config)
    assert family.preserved("model.layers.0.self_attn.rotary_emb.inv_freq", config)
    assert not family.preserved("model.layers.3.eh_proj.weight", config)
    assert not FAMILIES["mixtral"].preserved("model.layers.4.eh_proj.weight", config)
    assert family.refusals(config) == [] and config.model.num_layers == 4


def test_a_window_as_wide_as_the_model_reaches_is_none() -> None:
    assert bare({**MIXTRAL, "sliding_window": 128}).model.sliding_window is None
    assert bare({**MIXTRAL, "sliding_window": 127}).model.sliding_window == 127
