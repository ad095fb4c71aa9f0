"""Attention against its formula: rotary positions, documents, grouped keys and values."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.generate.cache import LayerKeyValues
from moetrain.model.attention import Attention, document_mask
from tests.support.rotary import table, turned

F64 = torch.float64


def attention(heads: int, kv_heads: int, **options: Any) -> Attention:
    made = Attention(dim=6, num_heads=heads, num_kv_heads=kv_heads, head_dim=4, eps=1e-6, **options).to(F64)
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return made


def by_loop(module: Attention, x_BSD: Tensor, documents_BS: Tensor | None = None) -> Tensor:
    """Head by head and query by query."""
    B, S, _ = x_BSD.shape
    kv_heads, width = module.num_kv_heads, module.head_dim
    rows = x_BSD @ module.qkv.weight.T + (0 if module.qkv.bias is None else module.qkv.bias)
    if module.qk_norm == "all":
        ends = module.num_heads * width, (module.num_heads + kv_heads) * width
        rows = torch.cat([normed(rows[..., :ends[0]], module.q_norm),
                          normed(rows[..., ends[0]:ends[1]], module.k_norm), rows[..., ends[1]:]], -1)
    if module.clip is not None:
        rows = rows.minimum(torch.tensor(module.clip)).maximum(torch.tensor(-module.clip))
    heads = rows.view(B, S, -1, width).transpose(1, 2)
    q, k, v = heads[:, :module.num_heads], heads[:, module.num_heads:-kv_heads], heads[:, -kv_heads:]
    if module.qk_norm == "head":
        q, k = normed(q, module.q_norm), normed(k, module.k_norm)
    q, k = turned(q), turned(k)
    scale = width**-0.5 if module.scale is None else module.scale
    rows = []
    for b in range(B):
        for s in range(S):
            seen = [t for t in range(s + 1)
                    if (documents_BS is None or documents_BS[b, t] == documents_BS[b, s])
                    and (module.window is None or s - t < module.window)]
            parts = []
            for head in range(module.num_heads):
                group = head * kv_heads // module.num_heads          # neighbours share a key and a value
                weights = (k[b, group, seen] @ q[b, head, s] * scale).exp()
                sink = 0 if module.sinks is None else module.sinks[head].exp()
                parts.append(weights / (weights.sum() + sink) @ v[b, group, seen])
            rows.append(torch.cat(parts))
    return (torch.stack(rows).view(B, S, -1) @ module.out.weight.T
            + (0 if module.out.bias is None else module.out.bias))


def normed(x: Tensor, norm: Any) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight


# Options of public families, alone and together.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "qwen3": {"qk_norm": "head"}, "olmoe": {"qk_norm": "all", "clip": 0.8},
    "qwen2": {"bias": "qkv"}, "gpt_oss": {"bias": "all", "sinks": True, "window": 2},
    "sinks": {"sinks": True, "scale": 0.7}, "window": {"window": 3, "scale": 0.7}, "wide": {"window": 9},
}
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]])


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("documents_BS", [None, DOCUMENTS], ids=["causal", "documents"])
def test_output_and_every_gradient_are_those_of_a_loop(heads, kv_heads, options, documents_BS):
    module = attention(heads, kv_heads, **OPTIONS[options])
    x_BSD = torch.randn(2, 5, 6, dtype=F64, requires_grad=True)
    mask = None if documents_BS is None else document_mask(documents_BS)
    ours, truth = module(x_BSD, table(5, 4), mask), by_loop(module, x_BSD, documents_BS)
    torch.testing.assert_close(ours, truth)
    leaves, grad = (x_BSD, *module.parameters()), torch.randn_like(truth)
    torch.testing.assert_close(*(torch.autograd.grad(out, leaves, grad) for out in (ours, truth)))


def test_the_mask_lets_a_query_see_its_own_document_up_to_itself():
    # A number that comes back is the same document
    mask = document_mask(torch.tensor([[0, 0, 1, 0]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]


def test_one_document_is_plain_causal_attention():
    module, x_BSD = attention(4, 2), torch.randn(2, 5, 6, dtype=F64)
    mask = document_mask(torch.zeros(2, 5, dtype=torch.int64))
    torch.testing.assert_close(module(x_BSD, table(5, 4), mask), module(x_BSD, table(5, 4), None))


def test_other_documents_leave_no_trace():
    module, x_BSD = attention(4, 2), torch.randn(2, 5, 6, dtype=F64)
    changed = x_BSD.clone()
    changed[0, :2] += 1
    before, after = (module(x, table(5, 4), document_mask(DOCUMENTS)) for x in (x_BSD, changed))
    assert torch.equal(before[0, 2:], after[0, 2:]) and not torch.equal(before[0, :2], after[0, :2])


@pytest.mark.parametrize("heads, kv_heads, options", [
    (2, 2, "plain"), (4, 2, "qwen3"), (3, 1, "plain"), (4, 2, "olmoe"), (4, 2, "gpt_oss"), (2, 1, "sinks"),
    (2, 2, "window")])
@pytest.mark.parametrize("first", [1, 3])
def test_positions_one_by_one_after_the_first_give_what_all_at_once_give(heads, kv_heads, options, first):
    module, x_BSD = attention(heads, kv_heads, **OPTIONS[options]), torch.randn(2, 5, 6, dtype=F64)
    earlier = LayerKeyValues(*(torch.full((2, kv_heads, 7, 4), torch.nan, dtype=F64) for _ in range(2)))
    parts = [module(x_BSD[:, :first], table(first, 4), None, earlier)]
    for position in range(first, 5):
        rotary = table(1, 4, first=position)
        parts.append(module(x_BSD[:, position:position + 1], rotary, None, earlier))
    torch.testing.assert_close(torch.cat(parts, 1), module(x_BSD, table(5, 4), None))
    assert earlier.length == 5 and earlier.k_BHSh[:, :, 5:].isnan().all()
