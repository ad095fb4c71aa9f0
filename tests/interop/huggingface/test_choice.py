"""Choice of the family of an export: the one that holds the model exactly, or a refusal that says why not."""

import pytest

from moetrain.config.compose import compose
from moetrain.config.schema import Config
from moetrain.errors import ConfigError
from moetrain.interop.huggingface.choice import choose_family


def config(*words: str) -> Config:
    return compose(["experiment=debug", "router.weights=renorm", *words])


def test_the_family_that_holds_the_model_is_found() -> None:
    assert choose_family(config()).model_type == "mixtral"
    assert choose_family(config("model.qk_norm=head")).model_type == "qwen3_moe"
    assert choose_family(config("model.qk_norm=head"), asked="qwen3_moe").model_type == "qwen3_moe"


def test_the_family_of_the_import_comes_first() -> None:
    both = config("model.num_layers=2")
    assert choose_family(both, origin="mixtral").model_type == "mixtral"


def test_every_option_in_the_way_is_named() -> None:
    with pytest.raises(ConfigError) as found:
        choose_family(config("capacity=position", "router=cosine"))
    assert found.value.id == "E-CONFIG-316" and "capacity" in found.value.where
    assert "router._target_" in found.value.where and "dropless" in found.value.why
    with pytest.raises(ConfigError) as found:
        choose_family(config("model.qk_norm=head"), asked="mixtral")
    assert "qk_norm" in found.value.where and "mixtral" in found.value.what


def test_a_family_that_is_unknown_is_named() -> None:
    with pytest.raises(ConfigError) as found:
        choose_family(config(), asked="qwen3moe")
    assert found.value.id == "E-CONFIG-315" and "qwen3_moe" in found.value.next
