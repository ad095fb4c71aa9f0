"""Permute and unpermute: rows in the order of their physical ids, and back to tokens.

    plan_permutation   physical ids [T, K]  ->  Permutation (integers alone, planned once per micro-batch)
    permute            rows[r] = x[token of r]
    unpermute          out[t] = sum of the rows of t: the adjoint of permute
    reorder            rows[i] = x[index[i]] for a permutation `index`
    permute_padded, unpermute_padded    the first two where some rows have no slot (ops/route_plan.py)

The ops are gathers in forward and in backward: they use no atomics, and the sum over a token's slots runs in
slot order. A slot with id -1 has no row.

The padded pair never needs the number of used rows. permute_padded fills a row without a slot with zeros;
unpermute_padded does not read it, whatever it holds.

Shapes: T tokens, K slots per token, R rows (used slots), D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.counts import count_ids
from moetrain.ops.extension import define, kernels_for


class Permutation(NamedTuple):
    """Row of each used slot, and slot of each row."""

    slots_R: Tensor          # int64: flat slot index t*K + k of each row, rows ordered by physical id
    rows_TK: Tensor          # int64: row of each slot; -1 where the slot is unused
    counts_P: Tensor         # int64: rows per physical id


def plan_permutation(physical_TK: Tensor, num_physical: int, rows: int | None = None) -> Permutation:
    """Order used slots by physical id, then by token, then by slot.

    Args:
        physical_TK: int64 [T, K], physical id of each slot; -1 is unused.
        num_physical: P, number of physical ids.
        rows: number of used slots, if it is known; otherwise the host waits for it.

    Returns:
        Permutation without padding.
    """
    flat_N = physical_TK.flatten()
    counts_P = count_ids(physical_TK, num_physical)
    rows = int(counts_P.sum()) if rows is None else rows
    slots_R = flat_N.where(flat_N >= 0, num_physical).argsort(stable=True)[:rows]
    rows_N = torch.full_like(flat_N, -1)
    rows_N[slots_R] = torch.arange(rows, device=flat_N.device)
    return Permutation(slots_R, rows_N.view_as(physical_TK), counts_P)


def gather_tokens(x_TD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    """Compute `permute` without autograd, for use inside other ops."""
    if kernels_for(x_TD):
        return _permute(x_TD, slots_R, rows_TK)
    return _gather(x_TD, slots_R, rows_TK)


def _gather(x_TD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    return x_TD.index_select(0, slots_R // rows_TK.shape[1])


def sum_slots(rows_RD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    """Compute `unpermute` without autograd. The rows of all slots are never gathered into one tensor."""
    if kernels_for(rows_RD):
        return _unpermute(rows_RD, slots_R, rows_TK)
    return _sum(rows_RD, slots_R, rows_TK)


def _sum(rows_RD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    tokens, slots = rows_TK.shape
    if rows_RD.device.type == "cuda":                  # below, the host would wait for a number
        return sum_padded(rows_RD, slots_R, rows_TK)
    if slots_R.numel() == 0:
        return rows_RD.new_zeros(tokens, rows_RD.shape[1])
    if slots_R.numel() == tokens * slots:              # every slot is used
        if slots == 1:
            return rows_RD.index_select(0, rows_TK[:, 0])
        return F.embedding_bag(rows_TK, rows_RD, mode="sum")
    used_TK = rows_TK >= 0
    used_T = used_TK.sum(1)
    return F.embedding_bag(rows_TK[used_TK], rows_RD, used_T.cumsum(0) - used_T, mode="sum")


def gather_padded(x_TD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    """Compute `permute_padded` without autograd."""
    if kernels_for(x_TD):
        return _permute(x_TD, slots_R, rows_TK)
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(slots_R.shape[0], x_TD.shape[1])
    tokens_R = slots_R.clamp(min=0) // rows_TK.shape[1]
    return x_TD.index_select(0, tokens_R).where((slots_R >= 0)[:, None], 0)


def sum_padded(rows_RD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    """Compute `unpermute_padded` without autograd: slot after slot, in float32 or better."""
    if kernels_for(rows_RD):
        return _unpermute(rows_RD, slots_R, rows_TK)
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    sum_TD = torch.zeros(rows_TK.shape[0], rows_RD.shape[1], dtype=wide, device=rows_RD.device)
    for rows_T in rows_TK.unbind(1) if rows_RD.shape[0] else ():
        sum_TD += rows_RD.index_select(0, rows_T.clamp(min=0)).where((rows_T >= 0)[:, None], 0)
    return sum_TD.to(rows_RD.dtype)


def _save_indices(ctx, inputs, output) -> None:
    _, slots_R, rows_TK = inputs
    ctx.save_for_backward(slots_R, rows_TK)


def _hold_indices(ctx, inputs, output) -> None:
    """Keep the indices on `ctx` instead of `save_for_backward`.

    Recomputation stops at the last saved tensor, so the combine is not exchanged again.
    """
    ctx.indices = inputs[1:]


_INDICES = "Tensor slots_R, Tensor rows_TK"


def _define_pair(suffix: str, gather: Callable[..., Tensor],
                 add: Callable[..., Tensor]) -> tuple[Callable, Callable]:
    """Define two ops, each the adjoint of the other."""
    permuted = define(
        f"permute{suffix}(Tensor x_TD, {_INDICES}) -> Tensor",
        reference=gather,
        fake=lambda x_TD, slots_R, rows_TK: x_TD.new_empty(slots_R.shape[0], x_TD.shape[1]),
        backward=lambda ctx, grad_RD: (unpermuted(grad_RD, *ctx.saved_tensors), None, None),
        setup_context=_save_indices,
    )
    unpermuted = define(
        f"unpermute{suffix}(Tensor rows_RD, {_INDICES}) -> Tensor",
        reference=add,
        fake=lambda rows_RD, slots_R, rows_TK: rows_RD.new_empty(rows_TK.shape[0], rows_RD.shape[1]),
        backward=lambda ctx, grad_TD: (permuted(grad_TD, *ctx.indices), None, None),
        setup_context=_hold_indices,
    )
    return permuted, unpermuted


_permute, _unpermute = _define_pair("", _gather, _sum)
_permute_padded, _unpermute_padded = _define_pair("_padded", gather_padded, sum_padded)
_reorder: Callable[..., Tensor] = define(
    "reorder(Tensor x_RD, Tensor index_R, Tensor inverse_R) -> Tensor",
    reference=lambda x_RD, index_R, inverse_R: x_RD.index_select(0, index_R),
    fake=lambda x_RD, index_R, inverse_R: torch.empty_like(x_RD),
    backward=lambda ctx, grad: (_reorder(grad, *reversed(ctx.saved_tensors)), None, None),
    setup_context=_save_indices,
)


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Copy each token x [T, D] to the rows [R, D] of its used slots."""
    return _permute(x_TD, permutation.slots_R, permutation.rows_TK)


def unpermute(rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """Sum the rows [R, D] of each token: [T, D]; zeros for a token without rows."""
    return _unpermute(rows_RD, permutation.slots_R, permutation.rows_TK)


def permute_padded(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Copy each token to the rows of its used slots; rows without a slot are zeros."""
    return _permute_padded(x_TD, permutation.slots_R, permutation.rows_TK)


def unpermute_padded(rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """Sum the rows of each token; rows without a slot are not read."""
    return _unpermute_padded(rows_RD, permutation.slots_R, permutation.rows_TK)


def values_of_rows(values_TK: Tensor, permutation: Permutation) -> Tensor:
    """Values [T, K] of slots in the order of the rows: [R], 0 for a row without a slot.

    Differentiable; its backward is a gather, too.
    """
    each_slot = permutation._replace(rows_TK=permutation.rows_TK.view(-1, 1))
    return permute_padded(values_TK.reshape(-1, 1), each_slot).flatten()


def reorder(x_RD: Tensor, index_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Reorder rows: x[index]. Its backward is a gather, too.

    Args:
        x_RD: rows [R, D].
        index_R: int64 [R], a permutation.
        inverse_R: int64 [R], its inverse.

    Returns:
        Rows [R, D].
    """
    return _reorder(x_RD, index_R, inverse_R)
