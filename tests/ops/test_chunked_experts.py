"""Experts chunk by chunk are experts over all rows: outputs, every gradient, one product for the matrices."""

import pytest
import torch
from torch import Tensor

from moetrain.ops.chunked_experts import ChunkedExperts
from moetrain.ops.grouped_experts import grouped_experts
from moetrain.ops.permute import plan_permutation

EXPERTS, WIDTH, HIDDEN, SLOTS = 3, 8, 8, 2
CHUNKS = {
    "even": [[[0, 1], [2, 0]], [[1, 2], [0, 2]]],
    "one without rows": [[[0, 1], [2, 0]], [[-1, -1]], [[1, -1]]],
    "an expert without rows": [[[0, 0]], [[2, 0], [2, 2], [0, -1]]],
    "no rows at all": [[[-1, -1]], [[-1, -1]]],
}


def inputs(ids: list[list[list[int]]], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Tokens and weights of each chunk, and the matrices: homes and copies."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(len(chunk), WIDTH, generator=generator).to(dtype).requires_grad_() for chunk in ids]
    weights = [torch.rand(len(chunk), SLOTS, generator=generator).requires_grad_() for chunk in ids]
    shapes = [(2, 2 * HIDDEN, WIDTH), (2, WIDTH, HIDDEN), (1, 2 * HIDDEN, WIDTH), (1, WIDTH, HIDDEN)]
    storage = torch.float64 if dtype == torch.float64 else torch.float32
    return xs, weights, [torch.randn(shape, generator=generator).to(storage).requires_grad_()
                         for shape in shapes]


def outcome(chunked: bool, ids: list[list[list[int]]], copied: bool, dtype: torch.dtype,
            on_device: bool = False) -> list[Tensor]:
    xs, weights, matrices = inputs(ids, dtype)
    homes, copies = ([torch.cat([matrices[0], matrices[2]]), torch.cat([matrices[1], matrices[3]])], None)
    if copied:
        homes, copies = matrices[:2], tuple(matrices[2:])
    experts = ChunkedExperts(*homes, copies) if chunked else None
    outs = []
    for x_TD, weights_TK, chunk in zip(xs, weights, ids):
        order = plan_permutation(torch.tensor(chunk), EXPERTS)
        weights_R = weights_TK.flatten().index_select(0, order.slots_R)
        counts = order.counts_P if on_device else order.counts_P.tolist()
        outs.append(experts(x_TD, weights_R, counts, order) if chunked else
                    grouped_experts(x_TD, weights_R, *homes, counts, order, copies))
    torch.stack([(out.double() ** 2).sum() for out in outs]).sum().backward()
    return [*(out.detach() for out in outs), *(x.grad for x in xs), *(w.grad for w in weights),
            *(m.grad for m in matrices)]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("ids", CHUNKS.values(), ids=CHUNKS.keys())
def test_chunks_give_what_each_gives_by_itself(ids, copied, dtype, tolerance):
    for ours, theirs in zip(*(outcome(chunked, ids, copied, dtype) for chunked in (True, False)),
                            strict=True):
        assert ours.dtype == theirs.dtype
        scale = max(1.0, theirs.abs().max().item() if theirs.numel() else 0)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


def test_counts_may_stay_on_the_device():
    ours, theirs = (outcome(True, CHUNKS["one without rows"], True, torch.float32, on_device)
                    for on_device in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_of_weights_are_made_once():
    xs, weights, matrices = inputs(CHUNKS["even"], torch.float64)
    with torch.profiler.profile() as profile:
        experts = ChunkedExperts(torch.cat([matrices[0], matrices[2]]), torch.cat([matrices[1], matrices[3]]))
        orders = [plan_permutation(torch.tensor(chunk), EXPERTS) for chunk in CHUNKS["even"]]
        sum(experts(x, w.flatten()[order.slots_R], order.counts_P.tolist(), order).sum()
            for x, w, order in zip(xs, weights, orders)).backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["_MatrixGradsBackward"] == 1 and calls["_ChunkBackward"] == 2
