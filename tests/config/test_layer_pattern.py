"""Which layers have experts: every form of the pattern, on models of every size up to twelve layers."""

import pytest

from moetrain.config.compose import compose
from moetrain.config.layer_pattern import is_sparse, sparse_layers
from moetrain.config.schema import ModelConfig
from moetrain.config.sizes import count_parameters, layer_kinds
from moetrain.errors import ConfigErrors

FORMS = {
    # An override, and the layers of a model of L layers that it stands for.
    "model.moe_layers=null": lambda layers: list(range(layers)),
    "model.moe_layers=every_1": lambda layers: list(range(layers)),
    "model.moe_layers=every_2": lambda layers: [layer for layer in range(layers) if layer % 2 == 1],
    "model.moe_layers=every_4": lambda layers: [layer for layer in range(layers) if (layer + 1) % 4 == 0],
    "model.moe_layers=every_3_from_0": lambda layers: [layer for layer in range(layers) if layer % 3 == 0],
    "model.moe_layers=every_3_from_4": lambda layers: [layer for layer in (4, 7, 10) if layer < layers],
    "model.moe_layers=[5,0]": lambda layers: [0, 5] if layers > 5 else None,
    "model.first_dense_layers=3": lambda layers: list(range(3, layers)) if layers > 2 else None,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_stands_for_its_layers(form: str) -> None:
    for layers in range(1, 13):
        wanted = FORMS[form](layers)
        overrides = [form, f"model.num_layers={layers}"]
        if wanted or form == "model.first_dense_layers=3" and layers == 3:
            sizes = compose(overrides).model
            assert list(sparse_layers(sizes)) == wanted
            assert [layer for layer in range(layers) if is_sparse(sizes, layer)] == wanted
        else:
            with pytest.raises(ConfigErrors) as caught:
                compose(overrides)
            assert caught.value.errors[0].id in ("E-CONFIG-220", "E-CONFIG-026")


def test_an_entry_of_no_experts_makes_a_layer_dense() -> None:
    by_entries = compose(["model.num_layers=4", "model.num_experts=[0,8,0,8]"]).model
    by_pattern = compose(["model.num_layers=4", "model.moe_layers=every_2"]).model
    assert list(sparse_layers(by_entries)) == list(sparse_layers(by_pattern)) == [1, 3]
    assert count_parameters(by_entries, 100) == count_parameters(by_pattern, 100)
    both = compose(["model.num_layers=4", "model.num_experts=[8,8,0,4]", "model.first_dense_layers=1"]).model
    assert list(sparse_layers(both)) == [1, 3]


def test_kinds_of_layers_are_counted_by_the_pattern() -> None:
    sizes = compose(["model.num_layers=7", "model.moe_layers=every_3", "model.dense_dim=24"]).model
    assert {(kind.layers, kind.dense_dim) for kind in layer_kinds(sizes)} == {(5, 24), (2, None)}


def test_a_pattern_costs_nothing_however_many_layers_there_are() -> None:
    assert len(sparse_layers(ModelConfig(num_layers=10**15, moe_layers="every_5"))) == 2 * 10**14
