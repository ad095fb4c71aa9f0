"""Chain-of-Experts against the recursions of its paper and of the authors' code, and its facts."""

import numpy as np
import pytest
import torch

from moetrain.config.compose import compose
from moetrain.config.sizes import count_parameters
from moetrain.model.flops import training_flops
from moetrain.routers.base import RouterContext
from tests.support.layer_equations import array, first_block, softmax, swiglu, tokens
from tests.support.training import make_run

RAW = ("router.weights=raw", "model.top_k=2")


def stream_behind(block, x_TD: torch.Tensor, context) -> torch.Tensor:
    """What the feed-forward half of a block makes of the stream of one sequence."""
    return block.moe(x_TD[None], context, norm=block.ffn_norm).out_TD[0]


def expected(block, u: np.ndarray, residual: str) -> np.ndarray:
    """The recursion as printed, with a plain loop over tokens, rounds and experts."""
    moe, weight = block.moe, array(block.ffn_norm.weight)

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + block.ffn_norm.eps) * weight

    def experts(x: np.ndarray, router) -> np.ndarray:
        probs = softmax(array(router.weight) @ x)
        bank, best = moe.experts.bank, np.argsort(-probs, kind="stable")[:2]
        shared = swiglu(moe.shared.gate_up.weight, moe.shared.down.weight, x)
        return shared + sum(probs[e] * swiglu(bank.gate_up[e], bank.down[e], x) for e in best)

    rows = []
    for start in u:
        x = start if residual == "stream" else norm(start)
        for router in moe.router:
            out = experts(norm(x) if residual == "stream" else x, router)
            x = out if residual == "outer" else x + out
        rows.append(start + x if residual in ("paper_literal", "outer") else x)
    return np.stack(rows)


@pytest.mark.parametrize("residual", ["stream", "paper_literal", "inner", "outer"])
def test_each_reading_is_its_recursion(residual: str) -> None:
    block = first_block("model.block=chain", "model.chain_rounds=3", f"model.chain_residual={residual}",
                        "model.num_shared_experts=1", *RAW)
    x_TD, context = tokens()
    out_TD = stream_behind(block, x_TD, context)
    np.testing.assert_allclose(array(out_TD), expected(block, array(x_TD), residual), rtol=0, atol=1e-12)


def test_one_round_on_the_stream_is_the_ordinary_block_to_the_bit() -> None:
    chain = make_run(["model.block=chain", "model.chain_rounds=1", "model.num_shared_experts=1"])
    plain = make_run(["model.num_shared_experts=1"])
    for mine, other in zip(chain.state.model.layers, plain.state.model.layers, strict=True):
        mine.moe.router[0].load_state_dict(other.moe.router.state_dict())
    ids_BS = torch.arange(24).view(2, 12)
    context = RouterContext(positions_T=torch.arange(24))
    ours, theirs = (run.state.model(ids_BS, context) for run in (chain, plain))
    assert torch.equal(ours.logits_BSV, theirs.logits_BSV)
    ours.logits_BSV.square().sum().backward()
    theirs.logits_BSV.square().sum().backward()
    mine, other = (run.state.model.layers[0].moe.experts.bank.down.grad for run in (chain, plain))
    assert torch.equal(mine, other) and mine.any()


def test_experts_of_zeros_leave_the_stream_and_every_round_is_trained() -> None:
    block = first_block("model.block=chain", *RAW)
    x_TD, context = tokens()
    stream_behind(block, x_TD, context).square().sum().backward()
    assert all(router.weight.grad.norm() > 0 for router in block.moe.router)
    with torch.no_grad():
        block.moe.experts.bank.down.zero_()
    assert torch.equal(stream_behind(block, x_TD, context), x_TD)


def test_half_as_many_experts_in_two_rounds_cost_the_same_and_another_router() -> None:
    plain = compose(["model.top_k=4", "model.num_layers=3"]).model
    chain = compose(["model.block=chain", "model.top_k=2", "model.num_layers=3"]).model
    more = 3 * 3 * 2 * plain.dim * plain.num_experts      # forward and backward, of three layers
    assert training_flops(chain, 100, 16) - training_flops(plain, 100, 16) == more
    ours, theirs = count_parameters(chain, 100), count_parameters(plain, 100)
    assert ours.experts == theirs.experts and ours.active_experts == theirs.active_experts
    assert ours.rest - theirs.rest == 3 * plain.dim * plain.num_experts
    shared = compose(["model.block=chain", "model.chain_share_router=true", "model.num_layers=3"]).model
    assert count_parameters(shared, 100).rest == theirs.rest
