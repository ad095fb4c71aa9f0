"""Latent attention against a loop over heads and queries in numpy, and against transformers' class."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.comm.mesh import lone_mesh
from moetrain.config.compose import compose
from moetrain.config.rope_scaling import yarn_logit_factor
from moetrain.generate.cache import LayerKeyValues
from moetrain.model.attention import document_mask
from moetrain.model.build import meta_model
from moetrain.model.latent_attention import LatentAttention
from moetrain.train.optim.muon import matrix_rows
from tests.support.any_router import MLA
from tests.support.rotary import table
from tests.support.stock_transformers import config_of, in_float64, stock

H, N, R, V, C, D = 3, 4, 2, 5, 6, 8
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]])
F64 = torch.float64


def attention(q_rank: int | None, value_dim: int = V, **options) -> LatentAttention:
    made = LatentAttention(dim=D, num_heads=H, q_rank=q_rank, kv_rank=C, nope_dim=N, rope_dim=R,
                           value_dim=value_dim, eps=1e-6, **options).to(F64)
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return made


def by_loop(module: LatentAttention, x_SD: np.ndarray, documents_S: list[int] | None) -> np.ndarray:
    """Equations 37 to 47 of DeepSeek-V2 for one sequence, head by head and query by query."""
    w = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    norm = lambda x, name: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[name]   # noqa: E731

    def turn(x, position):
        c, s = np.cos(position), np.sin(position)
        return np.array([x[0] * c - x[1] * s, x[1] * c + x[0] * s])

    S, v_dim = len(x_SD), module.value_dim
    q = (x_SD @ w["q.weight"].T if module.q is not None else
         norm(x_SD @ w["q_a.weight"].T, "q_a_norm.weight") @ w["q_b.weight"].T).reshape(S, H, N + R)
    both = x_SD @ w["kv_a.weight"].T
    c, k_r = norm(both[:, :C], "kv_a_norm.weight"), both[:, C:]
    kv = (c @ w["kv_b.weight"].T).reshape(S, H, N + v_dim)
    rows = []
    for s in range(S):
        seen = [t for t in range(s + 1) if documents_S is None or documents_S[t] == documents_S[s]]
        heads = []
        for h in range(H):
            scores = np.array([q[s, h, :N] @ kv[t, h, :N] + turn(q[s, h, N:], s) @ turn(k_r[t], t)
                               for t in seen]) / np.sqrt(N + R)
            share = np.exp(scores - scores.max())
            heads.append(share @ kv[seen, h, N:] / share.sum())
        rows.append(np.concatenate(heads))
    return np.stack(rows) @ w["out.weight"].T


@pytest.mark.parametrize("q_rank, value_dim", [(None, V), (7, V), (None, 9)])
@pytest.mark.parametrize("documents_BS", [None, DOCUMENTS], ids=["causal", "documents"])
def test_output_is_that_of_a_loop(q_rank, value_dim, documents_BS):
    module, x_BSD = attention(q_rank, value_dim), torch.randn(2, 5, D, dtype=F64)
    mask = None if documents_BS is None else document_mask(documents_BS)
    with torch.no_grad():
        ours = module(x_BSD, table(5, R), mask)
    for b in range(2):
        documents_S = None if documents_BS is None else documents_BS[b].tolist()
        expected = by_loop(module, x_BSD[b].numpy(), documents_S)
        np.testing.assert_allclose(ours[b].numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("q_rank", [None, 7])
def test_a_token_alone_reads_the_latents_of_earlier_ones(q_rank, first):
    module, x_BSD = attention(q_rank), torch.randn(2, 5, D, dtype=F64)
    widths = [width for heads, width in module.cached if heads == 1]
    assert widths == [C, R]
    earlier = LayerKeyValues(*(torch.full((2, 1, 7, width), torch.nan, dtype=F64) for width in widths))
    parts = [module(x_BSD[:, :first], table(first, R), None, earlier)]
    for position in range(first, 5):
        parts.append(module(x_BSD[:, position:position + 1], table(1, R, first=position), None, earlier))
    torch.testing.assert_close(torch.cat(parts, 1), module(x_BSD, table(5, R), None), rtol=1e-12, atol=1e-12)


def low_rank(module: LatentAttention) -> None:
    module.kv_b.add_low_rank(2)


def biased(module: LatentAttention) -> None:
    module.kv_b.bias = torch.nn.Parameter(torch.empty(H * (N + V)))


def replaced(module: LatentAttention) -> None:
    module.kv_b = torch.nn.Sequential(module.kv_b, torch.nn.Tanh())


@pytest.mark.parametrize("change", [low_rank, biased, replaced])
def test_a_map_of_the_latents_that_is_no_single_matrix_is_called(change):
    """What convert_model has made of it: a token alone must not read its matrix."""
    module, x_BSD = attention(None), torch.randn(1, 3, D, dtype=F64)
    change(module)
    module.to(F64)
    for parameter in module.kv_b.parameters():
        torch.nn.init.normal_(parameter)
    earlier = LayerKeyValues(*(torch.empty(1, 1, 3, width, dtype=F64) for _, width in module.cached))
    parts = [module(x_BSD[:, at:at + 1], table(1, R, first=at), None, earlier) for at in range(3)]
    torch.testing.assert_close(torch.cat(parts, 1), module(x_BSD, table(3, R), None), rtol=1e-12, atol=1e-12)


def test_the_scale_is_that_of_the_config_or_of_yarn():
    words = ["experiment=debug", *MLA, "model.rope_scaling={type: yarn, factor: 4, mscale_all_dim: 1, "
             "original_max_position_embeddings: 8}"]
    models = [meta_model(compose([*words, *more]), 50, lone_mesh(torch.device("cpu")))
              for more in ([], ["model.attention_multiplier=0.25"])]
    of_yarn = pytest.approx(6**-0.5 * (0.1 * np.log(4) + 1) ** 2)
    assert [model.layers[0].attention.scale for model in models] == [of_yarn, 0.25]


@pytest.mark.parametrize("q_rank, interleaved, bias", [
    (None, True, False), (7, True, True), (7, False, False)])
def test_values_and_gradients_are_those_of_transformers(q_rank, interleaved, bias):
    """With YaRN, whose scale reaches both the rotation and the products."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0,
            "mscale_all_dim": 0.7}
    config = config_of(
        "deepseek_v3", "DeepseekV3Config", hidden_size=D, num_attention_heads=H, num_key_value_heads=H,
        q_lora_rank=q_rank, kv_lora_rank=C, qk_nope_head_dim=N, qk_rope_head_dim=R, v_head_dim=V,
        attention_bias=bias, rope_interleave=interleaved, rms_norm_eps=1e-6, attn_implementation="sdpa",
        rope_parameters={**yarn, "rope_type": "yarn", "rope_theta": 100.0})
    theirs = in_float64(stock("deepseek_v3", "DeepseekV3Attention")(config, layer_idx=0))
    ours = attention(q_rank, bias="all" if bias else "none",
                     scale=(N + R) ** -0.5 * yarn_logit_factor(yarn))
    names = {"q": "q_proj", "q_a": "q_a_proj", "q_a_norm": "q_a_layernorm", "q_b": "q_b_proj",
             "kv_a": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "kv_b": "kv_b_proj",
             "out": "o_proj"}
    pairs = {name: theirs.get_parameter(names[module] + "." + tensor) for name, _ in ours.named_parameters()
             for module, tensor in [name.split(".")]}
    assert len(pairs) == len(list(theirs.parameters()))
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(ours.get_parameter(name))
    x_BSD = torch.randn(2, 5, D, dtype=F64)
    halves = table(5, R, scaling=yarn)
    causal = torch.full((5, 5), -torch.inf, dtype=F64).triu(1)[None, None]
    expected = theirs(x_BSD, (halves.cos_Sr[None], halves.sin_Sr[None]), attention_mask=causal)[0]
    found = ours(x_BSD, table(5, R, scaling=yarn, interleaved=interleaved), None)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    grad: Tensor = torch.randn_like(found)
    mine = torch.autograd.grad(found, [ours.get_parameter(name) for name in pairs], grad)
    other = torch.autograd.grad(expected, list(pairs.values()), grad)
    for name, a, b in zip(pairs, mine, other):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def test_latent_and_shared_key_are_two_matrices_of_muon():
    module = attention(7)
    assert matrix_rows(module)[module.kv_a.weight] == [C, R]
