"""Attention experts against ModuleFormer's equations, and the facts of stick-breaking weights."""

import numpy as np
import pytest
import torch

from moetrain.config.compose import compose
from moetrain.errors import ConfigErrors
from moetrain.model.attention_experts import stick_breaking
from moetrain.model.flops import training_flops
from moetrain.routers.base import RouterContext
from tests.support.layer_equations import array, first_block, softmax
from tests.support.training import make_run

EXPERTS = ("model.attention=experts", "model.num_attention_experts=5", "model.num_heads=4",
           "model.num_kv_heads=2", "router.weights=raw")
B, S, H, HEAD = 2, 7, 2, 4


def by_loop(q: np.ndarray, k: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Weights of one head: the newest key breaks its share off first, then the one before it."""
    A = np.zeros((len(q), len(k)))
    for i in range(len(q)):
        left = 1.0
        for j in reversed(range(i + 1)):
            if documents[i] == documents[j]:
                beta = 1 / (1 + np.exp(-q[i] @ k[j] / np.sqrt(len(q[i]))))
                A[i, j], left = beta * left, left * (1 - beta)
    return A


def test_weights_are_those_of_the_loop_and_break_one_stick() -> None:
    q, k = (2 * torch.randn(S, HEAD, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in (0, 1))
    documents_S = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    mask = (documents_S[:, None] == documents_S) & torch.ones(S, S, dtype=torch.bool).tril()
    alone = stick_breaking(q, k)
    np.testing.assert_allclose(array(alone), by_loop(array(q), array(k), np.zeros(S)), rtol=0, atol=1e-14)
    np.testing.assert_allclose(array(stick_breaking(q, k, mask)),
                               by_loop(array(q), array(k), array(documents_S)), rtol=0, atol=1e-14)
    assert torch.equal(alone, alone.tril()) and (alone.sum(-1) <= 1).all()
    assert alone[0, 0] == pytest.approx(float((q[0] @ k[0] / HEAD ** 0.5).sigmoid()))
    far = stick_breaking(torch.full((S, HEAD), 1e4), torch.ones(S, HEAD))          # beta is 1 in float32
    assert torch.equal(far, torch.eye(S))


def test_a_layer_is_the_equations_of_the_paper() -> None:
    attention = first_block(*EXPERTS).attention
    x_BSD = torch.randn(B, S, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out = array(attention(x_BSD, RouterContext(positions_T=torch.arange(B * S))).out_TD)
    bank = attention.experts.bank
    for sequence, found in zip(array(x_BSD), out, strict=True):
        k, v = np.split(sequence @ array(attention.kv.weight).T, 2, -1)
        probs = softmax(sequence @ array(attention.router.weight).T)
        for i, x in enumerate(sequence):
            y = 0
            for e in np.argsort(-probs[i], kind="stable")[:2]:
                q = (array(bank.queries[e]) @ x).reshape(H, HEAD)
                heads = [by_loop(np.tile(q[h], (i + 1, 1)), k[:i + 1, h * HEAD:(h + 1) * HEAD],
                                 np.zeros(i + 1))[i] @ v[:i + 1, h * HEAD:(h + 1) * HEAD] for h in range(H)]
                y = y + probs[i, e] * array(bank.outputs[e]) @ np.concatenate(heads)
            np.testing.assert_allclose(found[i], y, rtol=0, atol=1e-12)


def test_an_expert_that_nobody_chooses_changes_no_bit() -> None:
    words = [*EXPERTS, "router=sigmoid"]
    fewer, more = (make_run([*words, f"model.num_attention_experts={count}"]).state.model for count in (5, 6))
    own = more.state_dict()
    for name, tensor in fewer.state_dict().items():
        own[name][:len(tensor)] = tensor
    for block in more.layers:
        block.attention.router.bias[5] = -torch.inf
    ids_BS = torch.arange(S)[None]
    context = RouterContext(positions_T=torch.arange(S))
    assert torch.equal(more(ids_BS, context).logits_BSV, fewer(ids_BS, context).logits_BSV)


def test_scores_cost_what_plain_attention_does_and_a_router_comes_on_top() -> None:
    plain, experts = (compose(words).model for words in ([], EXPERTS[:2]))
    assert (training_flops(experts, 100, 64) - training_flops(plain, 100, 64)
            == 3 * 2 * plain.num_layers * plain.dim * 5)


@pytest.mark.parametrize("words, says", [
    (["model.qk_norm=head"], "with model.qk_norm=head"),
    (["model.num_attention_experts=1"], "has 1 of them, and a token takes num_heads / num_kv_heads = 2"),
    (["parallel=ep", "run.nproc=2"], "cannot hold 5 of them on 2 positions"),
    (["router.num_groups=2"], "with router.num_groups=2"),
])
def test_what_attention_experts_do_not_hold_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(ConfigErrors, match="E-CONFIG-282") as caught:
        compose([*EXPERTS, *words])
    assert says in str(caught.value)
