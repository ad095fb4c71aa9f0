"""Rows into slot order and back.

    plan_permutation   physical slot ids [T, K]  ->  Permutation (integers only, made once per micro-batch)
    permute            rows[r] = x[r's token]
    unpermute          out[t] = sum of t's rows: the adjoint of permute
    reorder            rows[i] = x[index[i]] for a permutation `index`
    permute_padded, unpermute_padded    the same two where some rows have no slot (ops/route_plan.py)

The differentiable ops are gathers forward and backward: no atomics, the sum over a token's slots runs in slot
order. Where a slot id is -1 the slot has no row.

The padded pair never asks how many rows are used: a row without a slot is zeros in permute_padded, and what it holds
(whatever that be) reaches nothing through unpermute_padded.

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
    """Where every used slot goes."""

    slots_R: Tensor          # int64: the flat slot index t*K + k of each row, rows ordered by physical id
    rows_TK: Tensor          # int64: the row of each slot; -1 where the slot is unused
    counts_P: Tensor         # int64: rows per physical slot id


def plan_permutation(physical_TK: Tensor, num_physical: int, rows: int | None = None) -> Permutation:
    """Order used slots by physical id, then by token, then by slot.

    physical_TK: int64, -1 in unused slots. rows: the number of used slots when it is known (saves a synchronisation).
    """
    flat_N = physical_TK.flatten()
    counts_P = count_ids(physical_TK, num_physical)
    rows = int(counts_P.sum()) if rows is None else rows
    slots_R = flat_N.where(flat_N >= 0, num_physical).argsort(stable=True)[:rows]
    rows_N = torch.full_like(flat_N, -1)
    rows_N[slots_R] = torch.arange(rows, device=flat_N.device)
    return Permutation(slots_R, rows_N.view_as(physical_TK), counts_P)


def gather_tokens(x_TD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    """What `permute` computes, without its gradient: for the inside of other ops."""
    if kernels_for(x_TD):
        return _permute(x_TD, slots_R, rows_TK)
    return _gather(x_TD, slots_R, rows_TK)


def _gather(x_TD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    return x_TD.index_select(0, slots_R // rows_TK.shape[1])


def sum_slots(rows_RD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    """What `unpermute` computes, without its gradient. The picked rows are never laid out side by side."""
    if kernels_for(rows_RD):
        return _unpermute(rows_RD, slots_R, rows_TK)
    return _sum(rows_RD, slots_R, rows_TK)


def _sum(rows_RD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    tokens, slots = rows_TK.shape
    if rows_RD.device.type == "cuda":                  # picking the used slots would make the host wait for their number
        return sum_padded(rows_RD, slots_R, rows_TK)
    if slots_R.numel() == 0:
        return rows_RD.new_zeros(tokens, rows_RD.shape[1])
    if slots_R.numel() == tokens * slots:              # every slot used
        return rows_RD.index_select(0, rows_TK[:, 0]) if slots == 1 else F.embedding_bag(rows_TK, rows_RD, mode="sum")
    used_TK = rows_TK >= 0
    used_T = used_TK.sum(1)
    return F.embedding_bag(rows_TK[used_TK], rows_RD, used_T.cumsum(0) - used_T, mode="sum")


def gather_padded(x_TD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    """What `permute_padded` computes, without its gradient."""
    if kernels_for(x_TD):
        return _permute(x_TD, slots_R, rows_TK)
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(slots_R.shape[0], x_TD.shape[1])
    tokens_R = slots_R.clamp(min=0) // rows_TK.shape[1]
    return x_TD.index_select(0, tokens_R).where((slots_R >= 0)[:, None], 0)


def sum_padded(rows_RD: Tensor, slots_R: Tensor, rows_TK: Tensor) -> Tensor:
    """What `unpermute_padded` computes, without its gradient: slot after slot, in float32 or better."""
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
    """Held, not saved: a layer that is recomputed for what backward saved then stops before its rows travel back."""
    ctx.indices = inputs[1:]


_INDICES = "Tensor slots_R, Tensor rows_TK"
def _define_pair(suffix: str, gather: Callable[..., Tensor], add: Callable[..., Tensor]) -> tuple[Callable, Callable]:
    """Two ops, each the adjoint of the other."""
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
_reorder = define(
    "reorder(Tensor x_RD, Tensor index_R, Tensor inverse_R) -> Tensor",
    reference=lambda x_RD, index_R, inverse_R: x_RD.index_select(0, index_R),
    fake=lambda x_RD, index_R, inverse_R: torch.empty_like(x_RD),
    backward=lambda ctx, grad: (_reorder(grad, *reversed(ctx.saved_tensors)), None, None),
    setup_context=_save_indices,
)


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Rows [R, D] in the order of the permutation: one copy of a token for each of its used slots."""
    return _permute(x_TD, permutation.slots_R, permutation.rows_TK)


def unpermute(rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """Sum of each token's rows [T, D]; zero for a token without rows."""
    return _unpermute(rows_RD, permutation.slots_R, permutation.rows_TK)


def permute_padded(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """`permute` where some rows have no slot: they are zeros."""
    return _permute_padded(x_TD, permutation.slots_R, permutation.rows_TK)


def unpermute_padded(rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """`unpermute` where some rows have no slot: they are not read."""
    return _unpermute_padded(rows_RD, permutation.slots_R, permutation.rows_TK)


def values_of_rows(values_TK: Tensor, permutation: Permutation) -> Tensor:
    """What each row's slot holds, [R], 0 for a row without one; differentiable, and a gather backward too."""
    each_slot = permutation._replace(rows_TK=permutation.rows_TK.view(-1, 1))
    return permute_padded(values_TK.reshape(-1, 1), each_slot).flatten()


def reorder(x_RD: Tensor, index_R: Tensor, inverse_R: Tensor) -> Tensor:
    """x[index], where `inverse` is the inverse permutation of `index`; its gradient is a gather too."""
    return _reorder(x_RD, index_R, inverse_R)
