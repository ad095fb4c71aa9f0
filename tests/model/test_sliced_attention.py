"""Union-of-Experts' heads against the attention that they are cut from, and against their equation."""

import numpy as np
import pytest
import torch

from moetrain.config.compose import compose
from moetrain.errors import ConfigErrors
from moetrain.model.attention import Attention, document_mask
from moetrain.model.flops import training_flops
from moetrain.model.sliced_attention import SlicedAttention
from moetrain.routers.base import RouterContext
from tests.support.layer_equations import array, first_block, softmax
from tests.support.rotary import table

SLICED = ["model.attention=sliced", "model.num_heads=4", "model.num_kv_heads=4", "router.weights=raw"]
B, S, D, H, HEAD = 2, 7, 16, 4, 4


def inputs(**context) -> tuple[torch.Tensor, RouterContext, tuple[torch.Tensor, torch.Tensor]]:
    x_BSD = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rotary = table(S, HEAD, 10000.0)
    return x_BSD, RouterContext(positions_T=torch.arange(S).repeat(B), **context), rotary


def plain(layer: SlicedAttention) -> Attention:
    """The attention whose heads the slices are."""
    attention = Attention(dim=D, num_heads=H, num_kv_heads=H, head_dim=HEAD, eps=0).double()
    bank = layer.experts.bank
    with torch.no_grad():
        of_kind = [torch.cat(list(each)) for each in zip(*(qkv.chunk(3) for qkv in bank.qkv))]
        attention.qkv.weight.copy_(torch.cat(of_kind))
        attention.out.weight.copy_(torch.cat(list(bank.out), 1))
    return attention


def test_all_heads_with_equal_weights_are_plain_attention() -> None:
    layer = first_block(*SLICED, "model.top_k_heads=4").attention
    x_BSD, context, rotary = inputs()
    with torch.no_grad():
        layer.router.weight.zero_()
    for mask in (None, document_mask(torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * B))):
        out = layer(x_BSD, context, rotary=rotary, mask=mask).out_TD
        np.testing.assert_allclose(array(out), array(plain(layer)(x_BSD, rotary, mask)), rtol=0, atol=1e-12)


def turned(x: np.ndarray, position: int) -> np.ndarray:
    angles = position * 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
    a, b = np.split(x, 2)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)])


def test_a_token_attends_in_its_heads_to_those_that_chose_them() -> None:
    """Two of four heads for each token, one token is padding and is in none."""
    layer = first_block(*SLICED).attention
    valid_T = torch.arange(B * S) != 4
    x_BSD, context, rotary = inputs(valid_T=valid_T)
    found, bank = array(layer(x_BSD, context, rotary=rotary).out_TD), layer.experts.bank
    valid = valid_T.view(B, S).numpy()
    for b, sequence in enumerate(array(x_BSD)):
        probs = softmax(sequence @ array(layer.router.weight).T)
        chosen = [set(np.argsort(-p, kind="stable")[:2]) if here else set()
                  for here, p in zip(valid[b], probs)]
        for i in range(S):
            y = np.zeros(D)
            for e in chosen[i]:
                q, k, v = np.split(sequence @ array(bank.qkv[e]).T, 3, -1)
                keys = [j for j in range(i + 1) if e in chosen[j]]
                a = softmax(np.array([turned(q[i], i) @ turned(k[j], j) / np.sqrt(HEAD) for j in keys]))
                y += H * probs[i, e] * array(bank.out[e]) @ (a @ v[keys])
            np.testing.assert_allclose(found[b, i], y, rtol=0, atol=1e-12)


def test_half_of_the_heads_cost_half_of_the_projections() -> None:
    words = ([], ["model.attention=sliced"], ["model.attention=sliced", "model.top_k_heads=1"])
    whole, half, quarter = (training_flops(compose([*each, "model.num_kv_heads=4"]).model, 100, -1)
                         for each in words)
    sizes = compose([]).model
    heads = 3 * 2 * sizes.num_layers * 4 * sizes.dim * sizes.dim             # q, k, v and output of all heads
    router = 3 * 2 * sizes.num_layers * sizes.dim * sizes.num_heads
    assert half - whole == router - heads / 2 and half - quarter == heads / 4


@pytest.mark.parametrize("words, says", [
    (["model.qk_norm=head"], "with model.qk_norm=head"),
    (["model.num_kv_heads=2"], "with model.num_kv_heads=2"),
    (["model.top_k_heads=5"], "with model.top_k_heads=5"),
    (["parallel=ep", "run.nproc=3", "model.num_experts=6", "train.global_batch=12"],
     "cannot hold 4 of them on 3 positions"),
])
def test_what_heads_cannot_be_sliced_into_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(ConfigErrors, match="E-CONFIG-282") as caught:
        compose([*SLICED, *words])
    assert says in str(caught.value)
