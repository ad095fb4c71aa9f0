"""Names of older releases are read as today's, in the checkpoints that have them and in no other."""

import pytest

from moetrain.checkpoint.records import Manifest, TensorEntry
from moetrain.checkpoint.tensor_names import NAMING, current_name

ENTRY = TensorEntry("F32", (2, 2), ())


@pytest.mark.parametrize("stored, current", [
    ("model.layers.3.attention.qkv", "model.layers.3.attention.qkv.weight"),
    ("optim.layers.10.attention.out.exp_avg", "optim.layers.10.attention.out.weight.exp_avg"),
    ("optim.layers.0.ffn.gate_up.exp_avg_sq", "optim.layers.0.ffn.gate_up.weight.exp_avg_sq"),
    ("optim.layers.0.moe.shared.down.momentum_buffer",
     "optim.layers.0.moe.shared.down.weight.momentum_buffer"),
    *((name, name) for name in (
        "model.layers.0.moe.experts.3.gate_up", "optim.layers.0.moe.experts.3.down.exp_avg", "model.embed",
        "model.layers.0.attention_norm.weight", "model.layers.0.attention.q_norm.weight",
        "model.layers.0.attention.qkv.bias", "buffer.layers.0.moe.router.bias", "plan.homes")),
])
def test_matrices_of_projections_have_new_names(stored: str, current: str) -> None:
    assert current_name(stored, 1) == current
    assert current_name(stored, NAMING) == stored and current_name(current, 1) == current


def test_a_manifest_answers_for_the_new_names() -> None:
    stored = {"model.embed": ENTRY, "model.layers.0.attention.qkv": ENTRY}
    old = Manifest(tensors=dict(stored))
    assert list(old.names()) == ["model.embed", "model.layers.0.attention.qkv.weight"]
    assert old.entry("model.layers.0.attention.qkv.weight") is ENTRY
    assert old.entry("model.layers.0.attention.qkv") is None
    # A layer of a user may have a bare matrix of that name.
    new = Manifest(facts={"names": NAMING}, tensors=dict(stored))
    assert list(new.names()) == list(stored) and new.entry("model.layers.0.attention.qkv") is ENTRY
