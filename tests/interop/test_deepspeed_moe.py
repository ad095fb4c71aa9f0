"""DeepSpeed's MoE layer as an oracle: on two ranks outputs, gradients and balance loss agree.

Its conventions: top-1 weighs by the raw probability (`router.weights=raw`), top-2 by the two probabilities
over their sum (`renorm`); its balance loss counts first choices only, which for top-1 are all choices.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import needs

needs.module("deepspeed", extra="deepspeed")

from tests.interop.layers import EXPERTS, TOKENS, assert_same, our_layer, ours, theirs, tokens
from tests.support.ranks import Ranks


@pytest.fixture(scope="module")
def ranks():
    """Ranks of their own: DeepSpeed keeps state per process."""
    with Ranks(2) as two:
        yield two


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(dim, hidden))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down)


def compare(top_k: int, weights: str, weight: float) -> None:
    from moetrain.interop.deepspeed import put_ninja_on_path

    os.environ["DS_ACCELERATOR"] = "cpu"
    put_ninja_on_path()
    import deepspeed
    from deepspeed.moe.layer import MoE

    rank = torch.distributed.get_rank()
    deepspeed.init_distributed("gloo", dist_init_required=False)
    layer = our_layer(f"model.top_k={top_k}", f"router.weights={weights}")
    bank = layer.experts.bank
    dim, hidden = bank.down.shape[1:]
    other = MoE(dim, SwiGLU(dim, hidden), num_experts=EXPERTS, ep_size=2, k=top_k, drop_tokens=False,
                use_rts=False, top2_2nd_expert_sampling=False)
    other.set_deepspeed_parallelism()
    gate, experts = other.deepspeed_moe.gate.wg.weight, list(other.deepspeed_moe.experts.deepspeed_experts)
    assert len(experts) == len(bank.experts) == EXPERTS // 2
    with torch.no_grad():
        gate.copy_(layer.router.weight)
        for index, expert in enumerate(experts):
            expert.gate_up.copy_(bank.gate_up[index])
            expert.down.copy_(bank.down[index])

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        out, balance, _ = other(x)
        return out, balance

    its = theirs(forward, gate, [(expert.gate_up, expert.down) for expert in experts], rank, weight)
    mine = ours(layer, rank, weight)
    if top_k == 2:
        probs = F.linear(tokens(rank)[0], layer.router.weight.detach()).softmax(-1)
        first = torch.bincount(probs.argmax(-1), minlength=EXPERTS) / TOKENS
        torch.testing.assert_close(its.balance, EXPERTS * (first * probs.mean(0)).sum())
        mine = mine._replace(balance=its.balance)
    assert_same(mine, its)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("top_k, weights, weight", [(1, "raw", 0.5), (2, "renorm", 0.0)])
def test_the_layer_gives_what_deepspeeds_gives(ranks, top_k, weights, weight):
    ranks.run(compare, top_k, weights, weight)


@pytest.mark.ranks
@pytest.mark.slow
def test_another_gate_convention_is_seen(ranks):
    """The comparison can fail, as with top-2 without the division by the sum."""
    with pytest.raises(AssertionError, match="output differs"):
        ranks.run(compare, 2, "raw", 0.0)
