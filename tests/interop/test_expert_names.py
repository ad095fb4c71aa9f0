"""Experts found by the names that Megatron-Core, torchtitan, transformers, DeepSpeed and moetrain give."""

import pytest

from moetrain.interop.expert_names import find_banks

LAYER = "model.layers.10"


@pytest.mark.parametrize("shapes, expected", [
    ({f"{LAYER}.block_sparse_moe.experts.{e}.{w}.weight": (4, 6) for e in range(8) for w in ("w1", "w2")}
     | {f"{LAYER}.block_sparse_moe.gate.weight": (8, 6)},
     {f"{LAYER}.block_sparse_moe": (["w1.weight", "w2.weight"], 8, 8)}),
    ({f"{LAYER}.mlp.experts.gate_up_proj": (8, 6, 8), f"{LAYER}.mlp.experts.gate_up_proj_bias": (8, 8),
      f"{LAYER}.mlp.router.weight": (8, 6), f"{LAYER}.mlp.router.bias": (8,)},
     {f"{LAYER}.mlp": (["gate_up_proj", "gate_up_proj_bias"], 8, 8)}),
    ({"layers.1.moe.experts.w1": (8, 4, 6), "layers.1.moe.router.gate.weight": (8, 6),
      "layers.1.moe.shared_experts.w1.weight": (4, 6), "layers.1.moe.expert_bias": (8,)},
     {"layers.1.moe": (["w1"], 8, 8)}),
    ({f"decoder.layers.3.mlp.experts.local_experts.{e}.linear_fc1.weight": (4, 6) for e in range(4)}
     | {"decoder.layers.3.mlp.router.weight": (8, 6)},
     {"decoder.layers.3.mlp": (["linear_fc1.weight"], 4, 8)}),
    ({f"decoder.layers.3.mlp.experts.linear_fc1.{kind}{e}": (4, 6)[:rank] for e in range(4)
      for kind, rank in (("weight", 2), ("bias", 1))},
     {"decoder.layers.3.mlp": (["linear_fc1.bias", "linear_fc1.weight"], 4, None)}),
    ({"decoder.layers.mlp.experts.experts.linear_fc1.weight": (2, 8, 4, 6),
      "decoder.layers.mlp.router.weight": (2, 8, 6)},
     {f"decoder.layers.mlp [{layer}]": (["linear_fc1.weight"], 8, 8) for layer in (0, 1)}),
    ({f"layers.0.deepspeed_moe.experts.deepspeed_experts.{e}.fc1.weight": (4, 6) for e in range(2)}
     | {"layers.0.deepspeed_moe.gate.wg.weight": (2, 6)},
     {"layers.0.deepspeed_moe": (["fc1.weight"], 2, 2)}),
    ({f"{LAYER}.block_sparse_moe.input_linear.weight": (8, 8, 6),
      f"{LAYER}.block_sparse_moe.router.layer.weight": (8, 6)},
     {f"{LAYER}.block_sparse_moe": (["input_linear.weight"], 8, 8)}),
    ({f"model.layers.0.moe.experts.{e}.gate_up": (8, 6) for e in range(3)}
     | {"model.layers.0.moe.router.weight": (3, 6)},
     {"model.layers.0.moe": (["gate_up"], 3, 3)}),
    ({"model.embed.weight": (9, 6), f"{LAYER}.mlp.gate_proj.weight": (4, 6),
      f"{LAYER}.mlp.shared_expert_gate.weight": (1, 6)}, {}),
])
def test_spellings(shapes, expected):
    found, _ = find_banks(shapes)
    assert {bank.name: (sorted(bank.matrices), len(bank.ids), bank.chosen_from) for bank in found} == expected


def test_layers_in_their_order_and_moments_apart():
    shapes = {f"layers.{layer}.moe.experts.w1": (2, 3, 4) for layer in (10, 9)}
    shapes |= {f"optim.state.{name}.{kind}": shape for name, shape in shapes.items()
               for kind, shape in (("exp_avg", shape), ("step", ()))}
    found, _ = find_banks(shapes)
    assert [(bank.name, bank.is_optimizer) for bank in found] == [
        ("layers.9.moe", False), ("layers.10.moe", False),
        ("optim.state.layers.9.moe", True), ("optim.state.layers.10.moe", True)]


def test_two_dims_do_not_say_where_an_expert_ends():
    assert find_banks({"layers.0.mlp.experts.weight1": (6, 32)}) == ([], ["layers.0.mlp.experts.weight1"])
