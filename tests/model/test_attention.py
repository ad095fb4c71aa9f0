"""Attention against its formula: rotary positions, documents, grouped keys and values."""

import pytest
import torch
from torch import Tensor

from moetrain.generate.cache import LayerKeyValues
from moetrain.model.attention import Attention, document_mask
from tests.support.rotary import table, turned

F64 = torch.float64


def attention(heads: int, kv_heads: int, *, qk_norm: bool = False) -> Attention:
    made = Attention(dim=6, num_heads=heads, num_kv_heads=kv_heads, head_dim=4,
                     qk_norm=qk_norm, eps=1e-6).to(F64)
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return made


def by_loop(module: Attention, x_BSD: Tensor, documents_BS: Tensor | None = None) -> Tensor:
    """Head by head and query by query."""
    B, S, _ = x_BSD.shape
    kv_heads, width = module.num_kv_heads, module.head_dim
    heads = (x_BSD @ module.qkv.weight.T).view(B, S, -1, width).transpose(1, 2)
    q, k, v = heads[:, :module.num_heads], heads[:, module.num_heads:-kv_heads], heads[:, -kv_heads:]
    if module.q_norm is not None:
        q, k = (t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
                for t, norm in ((q, module.q_norm), (k, module.k_norm)))
    q, k = turned(q), turned(k)
    rows = []
    for b in range(B):
        for s in range(S):
            seen = [t for t in range(s + 1)
                    if documents_BS is None or documents_BS[b, t] == documents_BS[b, s]]
            parts = []
            for head in range(module.num_heads):
                group = head * kv_heads // module.num_heads          # neighbours share a key and a value
                share = (k[b, group, seen] @ q[b, head, s] / width**0.5).softmax(0)
                parts.append(share @ v[b, group, seen])
            rows.append(torch.cat(parts))
    return torch.stack(rows).view(B, S, -1) @ module.out.weight.T


DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]])


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("documents_BS", [None, DOCUMENTS], ids=["causal", "documents"])
def test_output_and_every_gradient_are_those_of_a_loop(heads, kv_heads, qk_norm, documents_BS):
    module = attention(heads, kv_heads, qk_norm=qk_norm)
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


@pytest.mark.parametrize("heads, kv_heads, qk_norm", [(2, 2, False), (4, 2, True), (3, 1, False)])
@pytest.mark.parametrize("first", [1, 3])
def test_positions_one_by_one_after_the_first_give_what_all_at_once_give(heads, kv_heads, qk_norm, first):
    module, x_BSD = attention(heads, kv_heads, qk_norm=qk_norm), torch.randn(2, 5, 6, dtype=F64)
    earlier = LayerKeyValues(*(torch.full((2, kv_heads, 7, 4), torch.nan, dtype=F64) for _ in range(2)))
    parts = [module(x_BSD[:, :first], table(first, 4), None, earlier)]
    for position in range(first, 5):
        rotary = table(1, 4, first=position)
        parts.append(module(x_BSD[:, position:position + 1], rotary, None, earlier))
    torch.testing.assert_close(torch.cat(parts, 1), module(x_BSD, table(5, 4), None))
    assert earlier.length == 5 and earlier.k_BHSh[:, :, 5:].isnan().all()
