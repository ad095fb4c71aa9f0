"""Megatron-Core's MoE layer as an oracle: on two ranks outputs, gradients and balance loss agree.

Its conventions: `moe_router_pre_softmax` is our `router.weights=raw`, without it ours is `renorm`; its
`aux_loss` is our balance loss over one micro-batch of one rank (share of the slots times mean probability,
perfect = 1), attached to the activations in the layer instead of added to the loss.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import needs

needs.module("megatron.core", extra="megatron")

from tests.interop.layers import DIM, EXPERTS, TOKENS, assert_same, our_layer, ours, theirs
from tests.support.ranks import Ranks


@pytest.fixture(scope="module")
def ranks():
    """Ranks of their own: interop/megatron_cpu.py changes torch for a whole process."""
    with Ranks(2) as two:
        yield two


def megatron_layer(top_k: int, pre_softmax: bool, dispatcher: str, weight: float, hidden: int):
    from tests.interop.megatron_cpu import pretend

    pretend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe.experts import SequentialMLP
        from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_config import TransformerConfig
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    config = TransformerConfig(
        num_layers=1, hidden_size=DIM, num_attention_heads=2, ffn_hidden_size=hidden,
        moe_ffn_hidden_size=hidden,
        num_moe_experts=EXPERTS, moe_router_topk=top_k, moe_router_pre_softmax=pre_softmax,
        expert_model_parallel_size=2,
        moe_token_dispatcher_type=dispatcher, moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=weight,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, use_cpu_initialization=True,
        gradient_accumulation_fusion=False, bias_activation_fusion=False,
    )
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return MoELayer(config, MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=parts)))


def compare(top_k: int, weights: str, dispatcher: str, weight: float, pre_softmax: bool) -> None:
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

    rank = torch.distributed.get_rank()
    layer = our_layer(f"model.top_k={top_k}", f"router.weights={weights}")
    bank = layer.experts.bank
    other = megatron_layer(top_k, pre_softmax, dispatcher, weight, bank.down.shape[2])
    experts = [(expert.linear_fc1.weight, expert.linear_fc2.weight) for expert in other.experts.local_experts]
    assert len(experts) == len(bank.experts) == EXPERTS // 2
    with torch.no_grad():
        other.router.weight.copy_(layer.router.weight)
        for index, (gate_up, down) in enumerate(experts):
            gate_up.copy_(bank.gate_up[index])
            down.copy_(bank.down[index])

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = other(x.view(TOKENS, 1, DIM))
        with torch.no_grad():                        # its gradient is attached in the layer
            probs = F.linear(x, other.router.weight).softmax(-1)
            counts = torch.bincount(probs.topk(top_k, -1).indices.flatten(), minlength=EXPERTS)
            balance = switch_load_balancing_loss_func(probs, counts, TOKENS, top_k, EXPERTS, 1.0)
        return out.view(TOKENS, DIM), balance

    assert_same(ours(layer, rank, weight), theirs(forward, other.router.weight, experts, rank, weight))


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("top_k, weights, weight", [(2, "renorm", 0.5), (2, "raw", 0.5), (1, "raw", 0.5)])
def test_the_layer_gives_what_megatrons_gives(ranks, top_k, weights, weight, dispatcher):
    ranks.run(compare, top_k, weights, dispatcher, weight, weights == "raw")


@pytest.mark.ranks
@pytest.mark.slow
def test_another_gate_convention_is_seen(ranks):
    """The comparison can fail, as with softmax before top-k in one layer and after it in the other."""
    with pytest.raises(AssertionError, match="output differs"):
        ranks.run(compare, 2, "renorm", "alltoall", 0.0, True)
